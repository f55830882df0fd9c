"""The benchmark harness: it runs without a GPU, says so, and ends with one line of JSON."""

import json
from pathlib import Path

import pytest
import torch

from shoal.kernels.add_residual.bench import BENCH as ADD_RESIDUAL
from shoal.kernels.add_rms_norm.bench import BENCH as ADD_RMS_NORM
from shoal.kernels.benching import Bench, Record, format_table, format_winners, run
from shoal.kernels.core_apply.bench import BENCH as CORE_APPLY
from shoal.kernels.core_project.bench import BENCH as CORE_PROJECT
from shoal.kernels.fold_sum.bench import BENCH as FOLD_SUM
from shoal.kernels.grouped_matmul.bench import BENCH as GROUPED_MATMUL
from shoal.kernels.rope_kv.bench import BENCH as ROPE_KV
from shoal.kernels.silu_mul.bench import BENCH as SILU_MUL
from shoal.kernels.testing import max_error, poisoned_arena, poisoned_rows

BENCHES = [CORE_APPLY, FOLD_SUM, GROUPED_MATMUL, ADD_RMS_NORM, ROPE_KV, SILU_MUL]
BENCHES += [ADD_RESIDUAL, CORE_PROJECT]


def test_a_cpu_run_says_so_and_its_last_line_is_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "kernels.json"
    assert run(BENCHES, ["--device", "cpu", "--sweep", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "No GPU" in printed
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert {row["op"] for row in result["records"]} == {bench.op for bench in BENCHES}
    assert all(row["us"] > 0 and row["bytes"] > 0 for row in result["records"])


def test_addresses_are_aligned_distinct_and_inside_their_records() -> None:
    bench = Bench(torch.device("cpu"))
    addresses = bench.addresses(distinct=7, tokens=20, record_elements=1000, used=64)
    assert len(set(addresses.tolist())) == 7
    assert (addresses % 16 == 0).all()
    assert ((addresses % 992) + 64 <= 992).all()  # records start at multiples of 16
    changes = (addresses.diff() != 0).sum()
    assert changes == 6  # tokens of one adapter are neighbours


def test_a_lost_row_and_the_winner_of_a_sweep_are_marked() -> None:
    def row(config: str, us: float, speedup: float) -> Record:
        return Record(
            "op", "case", {"n": 1}, "float32", config, us, us, us, 8, 1.0, 1.0, 50.0, 1.0,
            "dense", us, us, speedup,
        )  # fmt: skip

    table = format_table([row("a", 2.0, 0.5), row("b", 1.0, 2.0)]).splitlines()
    assert table[1].endswith("(slower)")
    assert not table[2].endswith("(slower)")
    winners = format_winners([row("a", 2.0, 0.5), row("b", 1.0, 2.0)]).splitlines()
    assert winners[2].endswith("b")
    assert "+100.0 %" in winners[3]
    assert winners[3].endswith("a")


def test_an_error_measure_never_lets_nan_pass() -> None:
    assert max_error(torch.tensor([float("nan")]), torch.zeros(1)) == float("inf")
    assert max_error(torch.tensor([101.0]), torch.tensor([100.0])) == pytest.approx(0.01)


def test_poison_surrounds_the_values() -> None:
    values = torch.arange(6.0).view(2, 3)
    view = poisoned_rows(values)
    assert torch.equal(view, values)
    assert view.stride(0) > 3
    whole = view.as_strided((view.stride(0),), (1,))
    assert whole[3:].isnan().any()
    arena, starts = poisoned_arena([torch.ones(5), torch.ones(3)])
    assert [start % 8 for start in starts] == [0, 0]
    assert int(arena.isnan().sum()) == arena.numel() - 8
