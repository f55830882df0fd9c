"""What holds for every method: it learns, starts where it says, and lanes are apart."""

from pathlib import Path

import pytest
import torch
from tests.adapters.training.method_cases import CASES, LEARNING, Trial, fresh

from shoal.adapters.training.methods.lora_xs import CORE_STD

IDS = torch.arange(24).reshape(2, 12) + 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls(name: str, base: Path, cache: Path) -> None:
    trial = Trial(base, cache, name)
    trial.train(8)
    first, last = trial.losses[0].item(), trial.losses[-1].item()
    assert last < 0.9 * first


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_adapter_leaves_the_base_as_it_is(name: str, base: Path, cache: Path) -> None:
    with torch.no_grad():
        expected = fresh(base)(input_ids=IDS).logits
    trial = Trial(base, cache, name)
    # LoRA-XS starts beside zero; what takes a part out of the base and adds it again, at rounding.
    tolerance = 500 * CORE_STD if trial.method.name == "lora-xs" else 2e-5
    if trial.method.name in ("lora", "rslora", "lora-plus", "miss", "vera", "adalora", "svft"):
        tolerance = 0.0
    torch.testing.assert_close(trial.logits(IDS), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_lane_of_three_is_what_it_is_alone(name: str, base: Path, cache: Path) -> None:
    together = Trial(base, cache, name, (3, 5, 7))
    alone = Trial(base, cache, name, (5,))
    for target, linear in alone.adapted.items():
        for kind, value in linear.values(0).items():
            assert torch.equal(together.adapted[target].values(1)[kind], value)
    factors = [f for linear in together.adapted.values() for f in linear.factors().values()]
    trained = {id(p) for p in together.model.parameters() if p.requires_grad}
    assert trained == {id(factor) for factor in factors}
    assert all(factor.dtype == torch.float32 and len(factor) == 3 for factor in factors)
    for trial in (together, alone):
        trial.train(3)

    got, expected = together.logits(IDS.repeat(3, 1))[2:4], alone.logits(IDS)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    losses = torch.stack(together.losses)[:, 1]
    torch.testing.assert_close(losses, torch.cat(alone.losses), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*LEARNING, "lora-xs random", "miss by output", "miss mini"])
def test_on_a_16_bit_base_everything_trained_stays_float32(
    name: str, base: Path, cache: Path
) -> None:
    trial = Trial(base, cache, name, (0, 1), torch.bfloat16)
    trial.train(4)
    factors = [f for linear in trial.adapted.values() for f in linear.factors().values()]
    assert all(f.dtype == torch.float32 and bool(f.isfinite().all()) for f in factors)
    assert trial.logits(IDS).dtype == torch.bfloat16
    assert bool((trial.losses[-1] < trial.losses[0]).all())
