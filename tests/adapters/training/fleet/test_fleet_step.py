"""One step of a fleet: its gradients are the plain model's, and recorded steps are the same."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet import step, trainer
from shoal.adapters.training.fleet.config import FleetConfig
from shoal.adapters.training.fleet.inputs import Row, fleet_inputs, loss_by_lane
from shoal.adapters.training.fleet.trainer import FleetResult, fleet_step
from shoal.adapters.training.loading import exact_weights, load_base
from shoal.adapters.training.methods.attaching import shape_of
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all


class FleetLab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    root: Path

    def tasks(self, *tenants: dict[str, Any], name: str = ...) -> Path: ...
    def common(self, out: str, **options: Any) -> TrainConfig: ...
    def fleet(self, tasks: Path, out: str = ..., **options: Any) -> FleetResult: ...


def row(*ids: int, learnt: int) -> Row:
    """The last ``learnt`` tokens are to be learnt."""
    places = np.arange(len(ids) - 1 - learnt, len(ids) - 1)
    return Row(np.asarray(ids), places)


PARTS: list[tuple[int, list[Row]]] = [
    (2, [row(5, 6, 7, 8, 9, 10, 11, learnt=3), row(9, 8, learnt=1)]),
    (0, [row(40, 41, 42, learnt=2)]),
    (3, [row(7, 7, 9, 3, learnt=1), row(50, 9, 1, learnt=2), row(8, 4, 4, 4, 2, learnt=4)]),
]


def plain_gradients(
    lab: FleetLab, config: TrainConfig, rows: Sequence[Row], values: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one adapter, by transformers' logits and torch's autograd."""
    base = load_base(lab.base, torch.device("cpu"), "float32")
    shape = shape_of(base.model, "base", base.digest)
    source = Source(exact_weights(base), shape, lab.root / "bases")
    adapted = attach_all(base.model, config, source, [0])
    factors = {f"{t}.{n}": p for t, a in adapted.items() for n, p in a.factors().items()}
    with torch.no_grad():
        for name, factor in factors.items():
            factor[0] = values[name]
    total, count = torch.zeros(()), 0
    for one in rows:
        ids = torch.from_numpy(one.ids)[None]
        logits = base.model(input_ids=ids).logits[0]
        places = torch.from_numpy(one.places)
        total = total + F.cross_entropy(logits[places], ids[0, places + 1], reduction="sum")
        count += len(places)
    loss = total / count
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: factor.grad[0] for name, factor in factors.items() if factor.grad is not None}
    return loss.item(), grads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fixed", [None, 8])
@pytest.mark.parametrize("method", ["lora-xs", "miss"])
def test_every_lanes_gradient_is_that_of_the_plain_model(
    fleet_lab: FleetLab, method: str, fixed: int | None, checkpointing: bool
) -> None:
    options = {"method": method, "checkpoint_activations": checkpointing}
    scale = {} if method == "miss" else {"alpha": 2.0}
    common = fleet_lab.common("out", **options, **scale)
    config = FleetConfig(common=common, fleet=fleet_lab.root)
    base = load_base(fleet_lab.base, torch.device("cpu"), "float32")
    shape = shape_of(base.model, "base", base.digest)
    source = Source(exact_weights(base), shape, fleet_lab.root / "bases")
    core = fleet_step(config, base, source, 4)
    with torch.no_grad():
        core.optimizer.values.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    inputs = fleet_inputs(PARTS, 4, rates=[0.0] * 3, most_rows=fixed)
    nll = core.gradients(inputs)

    losses = loss_by_lane(inputs, nll)
    assert losses.keys() == {0, 2, 3}
    name = "R" if method == "lora-xs" else "D"
    for lane, rows in PARTS:
        mine, start = {}, 0
        for target, bank in core.banks.items():
            values = core.optimizer.values[lane, start : start + bank.shape.numel()]
            mine[f"{target}.{name}"] = values.view(bank.shape)
            start += bank.shape.numel()
        loss, grads = plain_gradients(fleet_lab, common, rows, mine)
        assert losses[lane] == pytest.approx(loss, rel=1e-5)
        for target, bank in core.banks.items():
            expected = grads[f"{target}.{name}"]
            error = (bank.gradient()[lane] - expected).abs().max()
            assert error <= 1e-5 * max(1.0, float(expected.abs().max())), target


@pytest.mark.parametrize("fixed", [None, 16])
@pytest.mark.parametrize("what", ["values", "loss"])
def test_a_lane_that_is_not_finite_stays_as_it_is_and_alone(
    fleet_lab: FleetLab, what: str, fixed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane of the first row, to which everything that fills up belongs."""
    config = FleetConfig(common=fleet_lab.common("out"), fleet=fleet_lab.root)
    base = load_base(fleet_lab.base, torch.device("cpu"), "float32")
    shape = shape_of(base.model, "base", base.digest)
    source = Source(exact_weights(base), shape, fleet_lab.root / "bases")
    core = fleet_step(config, base, source, 4)
    inputs = fleet_inputs(PARTS, 4, rates=[0.1] * 3, most_rows=fixed)
    broken = PARTS[0][0]
    if what == "values":
        core.optimizer.values[broken, 5] = math.inf
    else:  # its gradient is finite all the same
        weighted = step.weighted_nll

        def spoilt(*arguments: Any) -> tuple[Tensor, Tensor]:
            total, nll = weighted(*arguments)
            return total, nll.masked_fill(inputs.place_lanes == broken, math.nan)

        monkeypatch.setattr(step, "weighted_nll", spoilt)
    before = core.optimizer.values.clone()
    outcome = core.run(inputs)
    outcome.wait()
    assert outcome.updated.tolist() == [True, False, False, True]
    moved = (core.optimizer.values != before).any(dim=1)
    assert moved.tolist() == [True, False, False, True]
    assert torch.isfinite(core.optimizer.values[[0, 3]]).all()


def test_evaluation_measures_without_a_trace(fleet_lab: FleetLab) -> None:
    config = FleetConfig(common=fleet_lab.common("out"), fleet=fleet_lab.root)
    base = load_base(fleet_lab.base, torch.device("cpu"), "float32")
    shape = shape_of(base.model, "base", base.digest)
    source = Source(exact_weights(base), shape, fleet_lab.root / "bases")
    core = fleet_step(config, base, source, 4)  # cores are zero: the base's own loss
    inputs = fleet_inputs(PARTS, 4)
    losses = loss_by_lane(inputs, core.losses(inputs))
    assert not core.optimizer.grads.any()
    plain = AutoModelForCausalLM.from_pretrained(fleet_lab.base)
    for lane, rows in PARTS:
        total = 0.0
        for one in rows:
            ids, places = torch.from_numpy(one.ids), torch.from_numpy(one.places)
            with torch.no_grad():
                logits = plain(input_ids=ids[None]).logits[0]
            total += F.cross_entropy(logits[places], ids[places + 1], reduction="sum").item()
        count = sum(len(one.places) for one in rows)
        assert losses[lane] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("works", [True, False])
def test_recorded_steps_give_the_same_adapters(
    fleet_lab: FleetLab, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """And so do those of a decoder that cannot be recorded."""
    tasks = fleet_lab.tasks(*({"name": f"t{i}", "seed": i, "steps": 4 + i} for i in range(4)))
    options: dict[str, Any] = {"rows": 5, "resident": 3, "lr": 0.05}
    fleet_lab.fleet(tasks, "eager", **options)
    recorded: list[int] = []

    def recorder(work: Callable[[], None]) -> Callable[[], None]:
        """As CUDA's: runs to warm up, then does the same with whatever the tensors hold."""
        recorded.append(1)
        work()
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        return work

    def with_recorder(*arguments: Any) -> Any:
        core = fleet_step(*arguments)
        core.fixed_shapes, core._recorder = True, recorder
        return core

    monkeypatch.setattr(trainer, "fleet_step", with_recorder)
    fleet_lab.fleet(tasks, "recorded", **options)
    assert len(recorded) == 1  # one shape: rows, length and places are all padded
    for i in range(4):
        mine, theirs = (
            load_file(fleet_lab.root / out / f"t{i}" / "adapter_model.safetensors")
            for out in ("recorded", "eager")
        )
        for name, values in theirs.items():
            torch.testing.assert_close(mine[name], values, atol=1e-5, rtol=1e-3)


def test_fixed_shapes_are_few() -> None:
    keys = {
        fleet_inputs([(0, [row(*range(length), learnt=3)] * rows)], 2, most_rows=24).key
        for length in range(5, 129)
        for rows in (1, 8, 9, 16, 17, 24)
    }
    assert keys == {(rows, length, 256) for rows in (8, 16, 24) for length in (64, 128)}
