"""AdamW over lanes: PyTorch's for each of them, and no lane reaches another."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from shoal.adapters.training.optimizer import LaneAdamW

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2)}
RATES = {"b": 16.0}


def start(lanes: int, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn((4, *shape), generator=generator) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(value[:lanes].clone()) for name, value in whole.items()}


def gradients(lanes: int, step: int) -> dict[str, Tensor]:
    """Of lane k, ten times as large as those of lane k - 1."""
    generator = torch.Generator().manual_seed(100 + step)
    sizes = 0.01 * 10.0 ** torch.arange(4)
    return {
        name: (torch.randn((4, *shape), generator=generator) * sizes.view(4, *[1] * len(shape)))[
            :lanes
        ]
        for name, shape in SHAPES.items()
    }


def give(parameters: Mapping[str, nn.Parameter], grads: Mapping[str, Tensor]) -> None:
    """As ``backward()`` does: adds to what is there."""
    loss = sum((parameters[name] * grads[name]).sum() for name in parameters)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]


def values(parameters: Mapping[str, nn.Parameter], lane: int) -> dict[str, Tensor]:
    return {name: parameter[lane].detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("clip", [0.5, None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_lane_is_adamw_of_torch_after_clipping(clip: float | None, weight_decay: float) -> None:
    ours, theirs = start(1), start(1)
    optimizer = LaneAdamW(ours, weight_decay=weight_decay, clip=clip, rates=RATES)
    groups = [{"params": [p], "rate": RATES.get(name, 1.0)} for name, p in theirs.items()]
    reference = torch.optim.AdamW(groups, weight_decay=weight_decay)
    for step in range(20):
        lr = 0.01 * (step + 1)
        for group in reference.param_groups:
            group["lr"] = lr * group["rate"]
        reference.zero_grad()
        give(theirs, gradients(1, step))
        optimizer.zero_grad()
        give(ours, gradients(1, step))
        limit = float("inf") if clip is None else clip
        norm = nn.utils.clip_grad_norm_(theirs.values(), limit)
        reference.step()
        optimizer.lr.fill_(lr)
        optimizer.step()
        torch.testing.assert_close(optimizer.norm[0], norm)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_a_lane_among_others_is_the_lane_alone() -> None:
    together = start(4)
    optimizer = LaneAdamW(together, weight_decay=0.1, clip=0.5)
    rates = torch.tensor([0.1, 0.02, 0.003, 0.05], dtype=torch.float64)
    for step in range(10):
        optimizer.lr.copy_(rates * (step + 1))
        optimizer.zero_grad()
        give(together, gradients(4, step))
        optimizer.step()
    for lane in range(4):
        alone = {name: nn.Parameter(p.detach()[lane : lane + 1]) for name, p in start(4).items()}
        single = LaneAdamW(alone, weight_decay=0.1, clip=0.5)
        for step in range(10):
            single.lr.copy_(rates[lane : lane + 1] * (step + 1))
            single.zero_grad()
            give(alone, {name: g[lane : lane + 1] for name, g in gradients(4, step).items()})
            single.step()
        for name in SHAPES:
            torch.testing.assert_close(together[name][lane], alone[name][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["flag", "loss", "gradient"])
def test_a_lane_that_has_stopped_changes_no_more_and_the_others_do_not_notice(how: str) -> None:
    parameters, undisturbed = start(2), start(2)
    optimizer, reference = LaneAdamW(parameters), LaneAdamW(undisturbed)
    for step in range(6):
        for each in (optimizer, reference):
            each.lr.fill_(0.1)
            each.zero_grad()
        give(parameters, gradients(2, step))
        give(undisturbed, gradients(2, step))
        healthy = torch.tensor([True, True])
        if step == 3:
            stopped = {name: flat[1].clone() for name, flat in optimizer._flat().items()}
            if how == "flag":
                optimizer.active[1] = False
            elif how == "loss":
                healthy[1] = False
            else:
                parameters["b"].grad[1, 2] = float("nan")  # type: ignore[index]
        optimizer.step(healthy)
        reference.step()
    assert optimizer.active.tolist() == [True, False]
    assert optimizer.steps.tolist() == [6, 3]
    for name, flat in optimizer._flat().items():
        assert torch.equal(flat[1], stopped[name])
        assert torch.equal(flat[0], reference._flat()[name][0])


def test_a_lane_that_never_was_active_stays_as_it_began() -> None:
    parameters = start(2)
    before = values(parameters, 0)
    optimizer = LaneAdamW(parameters, weight_decay=0.1)
    optimizer.lr.fill_(0.1)
    optimizer.active[0] = False
    give(parameters, gradients(2, 0))
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in values(parameters, 0).items())


def test_gradients_add_up_until_they_are_zeroed() -> None:
    parameters = start(2)
    optimizer = LaneAdamW(parameters)
    give(parameters, gradients(2, 0))
    give(parameters, gradients(2, 1))
    first, second = gradients(2, 0), gradients(2, 1)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, first[name] + second[name])
    optimizer.zero_grad()
    assert not any(parameter.grad.any() for parameter in parameters.values())  # type: ignore[union-attr]


def test_its_state_restores_it() -> None:
    parameters, others = start(2), start(2, seed=9)
    optimizer, restored = LaneAdamW(parameters), LaneAdamW(others)
    for step in range(6):
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
            with pytest.raises(KeyError):
                restored.load({name: saved[name] for name in list(saved)[1:]})
            restored.load(saved)
        optimizer.lr.fill_(0.1)
        restored.lr.fill_(0.1)
        optimizer.zero_grad()
        restored.zero_grad()
        give(parameters, gradients(2, step))
        optimizer.step()
        if step >= 3:
            give(others, gradients(2, step))
            restored.step()
    for name, tensor in optimizer.state().items():
        assert torch.equal(tensor, restored.state()[name])


def test_parameters_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        LaneAdamW({})
    for other in (torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="equal lanes"):
            LaneAdamW({"a": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(other)})
