"""Blends of every kind of adapter against the origins' own weights: served logits.

An origin's delta is what it makes of each weight, less the base's; the oracle is the base with the
weighted sum of those added, in float64. Each blend is served alone, and all of them in one batch
beside the adapters that they are made of.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.e2e.origins import CASES, Base
from tests.e2e.serving_logits import Made, serve, silent, wrong
from tests.e2e.test_golden_families import LENGTH, ODD, config
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# By what has to come together: sections that add up, that lie side by side, that are rewritten.
BLENDS: Mapping[str, Mapping[str, float]] = {
    "one": {"xs": -0.5},
    "xs+rotated": {"xs": 0.7, "xs-rotated": -0.4},
    "two bases": {"xs-compact": 0.5, "xs-foreign": 1.5},
    "lora+patterns": {"lora": 1.0, "patterns": -0.6},
    "miss+bone": {"miss": 0.8, "bone": 0.5},
    "miss+mini": {"miss-64": 0.5, "miss-mini": 0.5},
    "corrections": {"pissa": 0.5, "olora": 0.25, "milora": 0.5},
    "pissa+xs": {"pissa": 0.6, "xs": 0.6},
    "dora+dora": {"dora": 0.5, "dora-pissa": 0.5},
    "dora+xs+pissa": {"dora": 0.4, "xs-rotated": 0.5, "pissa": 0.4},
    "svf+svft": {"svf": 0.5, "svft": -0.5, "svft-kept": 0.5},
    "all": {
        "xs": 0.2,
        "xs-foreign": 0.5,
        "lora": 0.3,
        "miss": 0.3,
        "olora": 0.2,
        "dora": 0.2,
        "svf": 0.2,
        "svft": 0.2,
    },
}


def delta(base: Base, origin: Any) -> dict[str, Tensor]:
    """What an origin adds to each weight, float64; it is of no further use."""
    model = origin.double()
    if isinstance(model, PeftModel) or hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return {
        module: model.get_submodule(module).weight.detach() - base.weight(module)
        for module in base.modules()
    }


@pytest.fixture(scope="module")
def odd(make_base: Callable[..., Any], make_adapter: Callable[..., Any]) -> Base:
    tiny = make_base("llama", **ODD)
    return Base(tiny.model, tiny.path, make_adapter)


@pytest.fixture(scope="module")
def made(odd: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder, rng = tmp_path_factory.mktemp("blends"), torch.Generator().manual_seed(2)
    needed = {part for parts in BLENDS.values() for part in parts}
    found: dict[str, Made] = {}
    deltas: dict[str, dict[str, Tensor]] = {}

    def add(name: str, served: Any, files: Any, changes: dict[str, Tensor], parts: Any) -> None:
        ids = torch.randint(3, odd.model.config.vocab_size, (2, LENGTH), generator=rng)
        logits = odd.logits(odd.merged(changes), ids)
        found[name] = Made(served, files, (ids[0], logits[0]), (ids[1], logits[1]), parts)

    add("base", None, {}, {}, {})
    for case in CASES:
        if case.name in needed:
            (folder / case.name).mkdir()
            deltas[case.name] = delta(odd, case.make(odd, folder / case.name, None))
            files = {path.name: path for path in (folder / case.name).glob("adapter_*")}
            add(case.name, case.served, files, deltas[case.name], {})
    for name, parts in BLENDS.items():
        total = {
            module: torch.stack([w * deltas[part][module] for part, w in parts.items()]).sum(0)
            for module in odd.modules()
        }
        add(name, None, {}, total, parts)
    return found


def test_every_blend_changes_what_is_said(odd: Base, made: dict[str, Made]) -> None:
    assert silent(odd, made, 0.05) == {}
    plain = odd.logits(odd.fresh(), torch.stack([made[name].alone[0] for name in BLENDS]))
    for name, logits in zip(BLENDS, plain, strict=True):
        spread = logits.max() - logits.min()
        assert float((logits - made[name].alone[1]).abs().max() / spread) > 0.05, name


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_float32(
    odd: Base,
    made: dict[str, Made],
    fused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the runner of a CPU, and by that of a GPU with its kernels' references."""
    monkeypatch.setattr("shoal.server.assemble.runs_fused", lambda *_: fused)
    assert wrong(serve(config(odd, tmp_path), made, monkeypatch)) == {}


def test_after_a_restart_a_blend_is_composed_again(
    odd: Base, made: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(serve(config(odd, tmp_path), made, monkeypatch, restart=True)) == {}
