"""The README's families: the table is what the code says, and every format and method is in it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.family_table import LLAMA_8B, REFUSED, ROWS, Refused, Served, table
from shoal.adapters.packing import make_spec
from shoal.adapters.reading import FORMATS
from shoal.adapters.training.config import METHOD_NAMES

ROOT = Path(__file__).parent.parent.parent
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def test_the_readme_holds_the_table() -> None:
    readme = (ROOT / "README.md").read_text()
    assert table() in readme, "put in what `python -m shoal.adapters.family_table` prints"
    assert readme.count("| adapter | `shoal train` |") == 1


def test_every_format_and_every_method_has_a_row() -> None:
    assert {name for row in ROWS for name in row.formats} == set(FORMATS.names())
    assert sorted(name for row in ROWS for name in row.methods) == sorted(METHOD_NAMES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name[:20])
def test_rows_are_what_they_say(row: Served) -> None:
    weights = row.example(LLAMA_8B)
    assert f"`{weights.family}`" in row.how
    text = (ROOT / row.test).read_text()
    assert re.search("|".join(row.formats), text), "the test does not name the format"
    # The example is of every module, so that no row looks cheaper than it is.
    assert set(weights.tensors) == set(LLAMA_8B.targets())
    assert make_spec(weights, LLAMA_8B, "").family == weights.family


def test_sizes_are_those_of_the_design() -> None:
    lines = {line.split(" | ")[0].strip("| "): line for line in table().splitlines()}
    sizes = {row.name: lines[row.name].split(" | ")[4] for row in ROWS}
    by_method = {name: sizes[row.name] for row in ROWS for name in row.methods}
    wanted = {"lora-xs": "115 KB", "miss": "44 MB", "lora": "84 MB"}
    assert wanted.items() <= by_method.items()


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name[:20])
def test_what_is_said_to_be_refused_is(golden: Any, row: Refused) -> None:
    folder = golden.folder / "refused"
    folder.mkdir()
    kinds = {row.kind: torch.ones(2, 16)}
    if row.config["peft_type"] == "LORA":
        kinds |= {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    save_file({f"{MODULE}.{k}": t for k, t in kinds.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, **row.config}))
    with pytest.raises(AdapterRejected, match=re.escape(row.reason)):
        golden.read(folder)
