"""Percentiles and summaries against values computed by hand."""

import pytest

from shoal.loadtests.report import last_line, record, table
from shoal.loadtests.stats import Percentiles, Sample, by_adapter, summarise

SAMPLES = [
    Sample(index=0, adapter="a", sent_s=10.0, token_s=(10.1, 10.2, 10.4), done_s=10.4),
    Sample(index=1, adapter=None, sent_s=10.0, token_s=(10.3,), done_s=10.3, prompt_tokens=5),
    Sample(index=2, adapter="a", sent_s=11.0, token_s=(), done_s=11.2, error="HTTP 500"),
    Sample(index=3, adapter="b", sent_s=11.0, token_s=(11.5, 12.0), done_s=12.0),
]


def test_percentiles_are_nearest_rank() -> None:
    assert Percentiles.of(range(1, 101)) == Percentiles(50, 90, 99)
    assert Percentiles.of(range(1, 11)) == Percentiles(5, 9, 10)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0, 3.0)
    assert Percentiles.of([]) is None


def test_summary_counts_received_tokens_and_leaves_failures_out() -> None:
    summary = summarise(SAMPLES)
    assert (summary.completed, summary.failed) == (3, 1)
    assert summary.output_tokens == 6
    assert summary.duration_s == pytest.approx(2.0)
    assert summary.output_tok_s == pytest.approx(3.0)
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.p50 == pytest.approx(300.0)
    assert summary.itl_ms is not None
    assert summary.itl_ms.p99 == pytest.approx(500.0)


def test_goodput_needs_every_objective() -> None:
    assert summarise(SAMPLES, {"ttft": 350.0}).goodput_req_s == pytest.approx(2 / 2.0)
    assert summarise(SAMPLES, {"ttft": 350.0, "tpot": 100.0}).goodput_req_s == pytest.approx(0.5)
    assert summarise(SAMPLES).goodput_req_s is None


def test_the_base_comes_first_then_the_busiest_adapter() -> None:
    assert list(by_adapter(SAMPLES)) == [None, "a", "b"]


def test_the_table_names_every_adapter_and_what_it_leaves_out() -> None:
    text = table(SAMPLES)
    assert all(name in text for name in ("(base)", "a", "b", "all"))
    assert "1 more adapters" in table(SAMPLES, rows_max=2)


def test_the_last_line_is_one_json_line() -> None:
    line = last_line(record(SAMPLES, {"seed": 1}, {}))
    assert "\n" not in line
    assert '"output_tokens": 6' in line
