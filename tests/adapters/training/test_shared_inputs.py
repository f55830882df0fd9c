"""Adapted linears as one function: gradients, ranks that are no multiple of 8, shared inputs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.training.method_cases import CASES, Trial
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.adapters.training.loss import LaneLoss
from shoal.adapters.training.methods import sharing
from shoal.adapters.training.methods.adalora import AdaloraLinear
from shoal.adapters.training.methods.dora import DoraLinear
from shoal.adapters.training.methods.lora import LoraLinear
from shoal.adapters.training.methods.lora_xs import CoreLinear
from shoal.adapters.training.methods.miss import FoldLinear, ShardLinear
from shoal.adapters.training.methods.sharing import SharedLinear

LANES, D_IN, SCALE = 2, 24, 0.5
OUTS = (16, 8, 32)


def lora_weight(one: Any, lane: int) -> Tensor:
    return one.linear.weight.double() + SCALE * one.b[lane] @ one.a[lane]


def dora_weight(one: Any, lane: int) -> Tensor:
    whole = lora_weight(one, lane)
    return one.m[lane][:, None] * whole / whole.detach().norm(dim=1, keepdim=True)


def adalora_weight(one: Any, lane: int) -> Tensor:
    return one.linear.weight.double() + SCALE * (one.b[lane] * one.e[lane]) @ one.a[lane]


def core_weight(one: Any, lane: int) -> Tensor:
    weight = one.linear.weight.double()
    basis = one.frozen_factors()[1].double()
    return weight + SCALE * basis @ one.core[lane].double() @ basis.T @ weight


def fold_weight(one: Any, lane: int) -> Tensor:
    repeated = one.d[lane].repeat(-(-D_IN // one.d.shape[1]), 1)[:D_IN]
    return one.linear.weight.double() + repeated.T


def shard_weight(one: Any, lane: int) -> Tensor:
    rank, d_out = one.d.shape[1], one.linear.out_features
    size, longer = divmod(d_out, rank)
    sizes = torch.tensor([size + (shard < longer) for shard in range(rank)])
    return one.linear.weight.double() + one.d[lane].repeat_interleave(sizes, dim=0)


def cores(linear: nn.Linear, rank: int) -> CoreLinear:
    basis = torch.linalg.qr(torch.randn(linear.out_features, rank, dtype=torch.float64)).Q
    return CoreLinear(linear, basis, torch.zeros(LANES, rank, rank), SCALE)


def factors(rank: int, d_out: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(LANES, rank, D_IN), torch.zeros(LANES, d_out, rank)


Make = Callable[[nn.Linear, int], SharedLinear]
KINDS: dict[str, tuple[Make, Callable[[Any, int], Tensor]]] = {
    "lora": (lambda x, r: LoraLinear(x, *factors(r, x.out_features), SCALE), lora_weight),
    "dora": (lambda x, r: DoraLinear(x, *factors(r, x.out_features), SCALE), dora_weight),
    "lora-xs": (cores, core_weight),
    "miss": (lambda x, r: FoldLinear(x, r, LANES), fold_weight),
    "miss by output": (lambda x, r: ShardLinear(x, r, LANES), shard_weight),
    "adalora": (lambda x, r: AdaloraLinear(x, *factors(r, x.out_features), SCALE), adalora_weight),
}


def linears_of(make: Make, rank: int, dtype: torch.dtype, biased: bool) -> list[SharedLinear]:
    torch.manual_seed(2)
    linears = []
    for d_out in OUTS:
        linear = nn.Linear(D_IN, d_out, bias=biased).to(dtype).requires_grad_(False)
        adapted = make(linear, rank)
        for factor in adapted.factors().values():
            nn.init.normal_(factor, std=0.3)
        linears.append(adapted.double() if dtype == torch.float64 else adapted)
    return linears


def results(outs: Sequence[Tensor], x: Tensor, linears: Sequence[SharedLinear]) -> list[Tensor]:
    """Outputs and gradients, float64."""
    trained = [factor for one in linears for factor in one.factors().values()]
    loss = sum((out.double().sin() * index).sum() for index, out in enumerate(outs, 1))
    grads = torch.autograd.grad(loss, [x, *trained])  # type: ignore[arg-type]
    assert [grad.shape for grad in grads[1:]] == [factor.shape for factor in trained]
    assert all(grad.dtype == factor.dtype for grad, factor in zip(grads[1:], trained, strict=True))
    return [each.double() for each in (*outs, *grads)]


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.03)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_together_they_are_their_formula(
    kind: str, dtype: torch.dtype, tolerance: float, rank: int, biased: bool
) -> None:
    make, weight_of = KINDS[kind]
    linears = linears_of(make, rank, dtype, biased)
    x = torch.randn(2 * LANES, 5, D_IN).to(dtype).requires_grad_()
    wanted = []
    for one in linears:
        rows = x.double().chunk(LANES)
        y = torch.cat([rows[lane] @ weight_of(one, lane).T for lane in range(LANES)])
        wanted.append(y if one.linear.bias is None else y + one.linear.bias.double())
    expected = results(wanted, x, linears)
    for found, right in zip(
        results(type(linears[0]).together(linears, x), x, linears), expected, strict=True
    ):
        assert (found - right).abs().max() <= tolerance * right.abs().max()


def test_linears_of_other_inputs_get_what_they_ask_for() -> None:
    one, other, last = linears_of(KINDS["lora"][0], 3, torch.float32, True)
    x, y = torch.randn(2, LANES, 3, D_IN)
    alone = [linear(z) for linear, z in ((one, x), (other, y), (last, x), (one, y))]
    group = sharing._Together([one, other, last])
    for index, linear in enumerate((one, other, last)):
        linear._shared = group, index
    assert all(
        torch.allclose(linear(z), want, atol=1e-6)
        for (linear, z), want in zip(
            ((one, x), (other, y), (last, x), (one, y)), alone, strict=True
        )
    )


class Rows(TorchDispatchMode):
    """Looks at the matrices of every 16-bit product, but for those with the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.unaligned: list[Any] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            self.products += 1
            for t in (*args, out):
                if not isinstance(t, Tensor) or t.element_size() > 2 or self.vocabulary in t.shape:
                    continue
                strides = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s != 1]
                if any(stride % 8 for stride in strides):
                    self.unaligned.append((name, t.shape, t.stride()))
        return out


@pytest.mark.parametrize(
    "name",
    [
        "lora", "dora", "pissa", "adalora", "lora-xs official", "lora-xs random", "miss",
        "miss mini", "miss by output", "vera",
    ],
)  # fmt: skip
def test_rows_of_16_bit_matrices_are_aligned_whatever_the_rank(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, name, (CASES[name][0], CASES[name][1] | {"rank": 5}))
    trial = Trial(base, tmp_path, name, (0, 1), torch.bfloat16)
    with Rows(trial.model.config.vocab_size) as seen:
        trial.train(1)
    assert seen.products > 50
    assert seen.unaligned == []


class Adds(TorchDispatchMode):
    """Counts what is added to something of one shape, in 16 bits, outside of products."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("add", "add_") and out.dtype == torch.bfloat16:
            self.count += out.shape == self.shape
        return out


@pytest.mark.parametrize("name", ["lora", "lora-xs official", "miss"])
def test_gradients_of_an_input_are_added_up_inside_of_products(
    name: str, base: Path, tmp_path: Path
) -> None:
    trial = Trial(base, tmp_path, name, (0, 1), torch.bfloat16)
    LaneLoss(trial.model)  # fuses norms, which would add as well
    config = trial.model.config
    with Adds((4, 8, config.hidden_size)) as adds:
        trial.train(1)
    # Two residual connections a layer, each way; nothing before the first needs a gradient.
    assert adds.count == 4 * config.num_hidden_layers - 1
