"""A fleet's steps on CUDA, recorded and not, against the same steps on a CPU."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.adapters.spec import Target
from shoal.adapters.training.activations import checkpoint_activations
from shoal.adapters.training.attention import use_causal_attention
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet.inputs import Row, fleet_inputs, loss_by_lane
from shoal.adapters.training.fleet.linears import attach_banks
from shoal.adapters.training.fleet.products import Step
from shoal.adapters.training.fleet.step import FleetStep
from shoal.adapters.training.methods.attaching import find_linears
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.norms import fuse_norms
from shoal.adapters.training.runner import CudaRecorder

LANES, ROWS, STEPS = 6, 16, 8
CPU = torch.device("cpu")


def make_step(
    method: str, device: torch.device, dtype: torch.dtype, *, recorded: bool, again: bool
) -> FleetStep:
    """The same base, basis and values everywhere."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    generator = torch.Generator().manual_seed(1)
    factors: dict[Target, Tensor] = {}
    for target, (_, linear) in find_linears(model).items():
        drawn = torch.randn((linear.out_features, 12), generator=generator)
        factors[target] = torch.linalg.qr(drawn).Q
    source = cast(Source, SimpleNamespace(canonical=SimpleNamespace(factors=factors)))
    asked: dict[str, Any] = {"method": method, "base": "", "data": "", "out": "", "rank": 12}
    step = Step()
    banks = attach_banks(model, TrainConfig(**asked), source, LANES, step)
    use_causal_attention(model)
    fuse_norms(model)
    if again:
        checkpoint_activations(model)
    recorder = CudaRecorder(device) if recorded else None
    core = FleetStep(model, banks, step, recorder=recorder)
    start = torch.randn(core.optimizer.values.shape, generator=generator) * 0.02
    with torch.no_grad():
        core.optimizer.values.copy_(start)
    return core


def run(core: FleetStep) -> tuple[Tensor, list[dict[int, float]]]:
    """Steps of different lanes and lengths; the values afterwards, and the losses."""
    draw = np.random.default_rng(0)
    losses = []
    for number in range(STEPS):
        parts = []
        for lane in range(number % 2, LANES, 1 + number % 2):
            lengths = draw.integers(5, 100, size=1 + (lane + number) % 3)
            rows = [Row(draw.integers(0, 300, n), np.arange(n // 2, n - 1)) for n in lengths]
            parts.append((lane, rows))
        most = ROWS if core.fixed_shapes else None
        inputs = fleet_inputs(parts, LANES, rates=[0.01] * len(parts), most_rows=most)
        outcome = core.run(inputs.pinned() if core.device.type == "cuda" else inputs)
        outcome.wait()
        assert outcome.updated.tolist() == inputs.active.tolist()
        losses.append(loss_by_lane(inputs, outcome.nll))
    return core.optimizer.values.cpu(), losses


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("method", ["lora-xs", "miss"])
def test_steps_in_float32_are_those_of_a_cpu(method: str, recorded: bool, again: bool) -> None:
    cuda = torch.device("cuda")
    wanted, expected = run(make_step(method, CPU, torch.float32, recorded=False, again=False))
    found, losses = run(make_step(method, cuda, torch.float32, recorded=recorded, again=again))
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    assert (found - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["lora-xs", "miss"])
def test_recorded_steps_in_bfloat16_are_the_eager_ones_and_repeat(method: str) -> None:
    cuda = torch.device("cuda")
    eager, expected = run(make_step(method, cuda, torch.bfloat16, recorded=False, again=False))
    once, losses = run(make_step(method, cuda, torch.bfloat16, recorded=True, again=False))
    twice, _ = run(make_step(method, cuda, torch.bfloat16, recorded=True, again=False))
    assert torch.equal(once, twice)
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=0.05)
    assert (once - eager).abs().mean() < 2e-3
