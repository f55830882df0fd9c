"""The offline benchmark: what it counts, that its adapters act, and what it can do without."""

import json
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from shoal.server.__main__ import main
from shoal.server.model.config import ModelConfig
from shoal.server.model.shapes import SHAPES

SMALL = ["bench", "offline", "--model-shape", "tiny", "--device", "cpu", "--rounds", "1"]
SMALL += ["--requests", "6", "--input", "20", "--output", "5"]
ABSENT = ("fastapi", "uvicorn", "pydantic", "sqlalchemy", "gguf", "platformdirs", "tqdm", "fsspec")


def bench(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert main([*SMALL, *flags]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert isinstance(last, dict)
    return last


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_every_request_gets_its_tokens_and_adapters_change_them(
    family: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    results = tmp_path / "new" / "offline.jsonl"
    flags = ["--family", family, "--rank", "4", "--adapters", "3", "--resident", "40"]
    last = bench(capsys, *flags, "--results", str(results))
    assert last["output_tokens"] == 6 * 5
    assert cast(int, last["changed_requests"]) >= 4  # five tokens may happen to be the same
    assert (last["adapters"], last["resident"]) == (3, 40)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["side"] for line in lines] == ["base", "adapters"]
    assert [line["adapters"] for line in lines] == [0, 3]
    fields = "run_id requests input output adapters family rank resident output_tok_s step_ms"
    for line in lines:
        assert line.keys() >= {*fields.split(), "commit", "gpu", "torch", "triton"}
        assert line["output_tokens"] == 6 * 5
        assert line["run_id"] == last["run_id"]
        assert line["host_ms"] >= max(line["plan_ms"], line["submit_ms"], line["commit_ms"])
    base = cast(dict[str, float], last["base"])
    assert base["adapter_bytes"] == 0 < cast(int, last["adapter_bytes"])
    assert base["bound_ms"] <= cast(float, last["bound_ms"])


def test_rows_beyond_a_step_and_a_bank_without_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    last = bench(capsys, "--max-num-seqs", "4", "--max-num-batched-tokens", "32")
    assert last["output_tokens"] == 6 * 5
    assert last["decode_rows"] == 4
    assert last["resident"] == 0
    assert "changed_requests" not in last


def test_a_profile_leaves_the_figures_and_names_operations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--adapters", "2", "--rank", "4", "--profile", "--max-num-batched-tokens", "256"]
    assert main([*SMALL, *flags]) == 0
    out = capsys.readouterr().out
    assert "aten::mm" in out
    assert "base: a decode step" in out
    assert "adapters: a decode step" in out
    assert json.loads(out.strip().splitlines()[-1])["output_tokens"] == 6 * 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapters", "1", "--resident", "100000000"], "GiB are needed"),
        (["--adapters", "4", "--resident", "3"], "--resident is 3"),
        (["--adapters", "1", "--rank", "65"], "the rank is 65: must be from 1 to 32"),
        (["--output", "2000"], "at most 1024"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_made(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *flags]) == 2
    assert said in capsys.readouterr().err


def test_it_runs_where_only_torch_is_installed() -> None:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    script = f"{blocked}; from shoal.server.__main__ import main; sys.exit(main({SMALL!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["output_tokens"] == 6 * 5


def test_the_8b_shape_has_as_many_weights_as_the_model() -> None:
    model = ModelConfig.from_hf(SHAPES["llama-3.1-8b"])
    shape = model.base_shape("x", "0" * 64)
    linears = model.num_layers * sum(d.d_out * d.d_in for d in shape.dims.values())
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert linears + norms + 2 * model.vocab_size * model.hidden_size == 8_030_261_248
    assert model.ropes[0].kind == "llama3"
