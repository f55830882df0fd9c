"""MiSS's controlled experiment (its section 3.1, Figure 2 and Table 12): an MLP fits sines.

A base of one hidden layer is trained on ``sin(2πx)``; then the target becomes ``sin(2πx) +
0.3 cos(3πx)`` and each method adapts the frozen base. Every number is that of Table 12. What it
leaves open is chosen here: ReLU, Adam, all samples in one batch (50 are one), new samples for the
adaptation, mean squared error, adapters on both linears. ProLoRA, MoRA and MoS are not methods of
this trainer.

Nor does it say how a sine has 64 inputs. Two readings are measured: one ``x`` a sample, given to
every input and asked of every output (`SHARED`: a function of one variable); and an ``x`` of its
own for each input and output (`SEPARATE`: 50 samples in 64 dimensions).
"""

import copy
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.spec import BaseShape, Dims, Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.experiments.log import Log
from shoal.adapters.training.experiments.place import place
from shoal.adapters.training.methods.contract import AdaptedLinear, Method, Start
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import method_of

WIDTH = 64
TRAIN_SAMPLES, VALID_SAMPLES = 50, 100
NOISE = 0.05
BASE_LR = ADAPT_LR = 1e-3
BASE_EPOCHS, ADAPT_EPOCHS = 250, 100
EVAL_INTERVAL = 10
# The paper's seed, and others for a standard deviation.
SEED = 43
SEEDS = tuple(range(43, 53))
# Table 12's ranks; MiSS has then as many values as LoRA: r·d_out against r·(d_in + d_out).
RANKS: Mapping[str, int] = {"lora": 2, "vera": 64, "miss": 4, "pissa": 2, "dora": 1, "adalora": 2}
FULL = "full fine-tuning"
SHARED, SEPARATE = "shared x", "separate x"
_TARGETS = ("up_proj", "down_proj")


class Mlp(nn.Module):
    """``(n, 64) -> (n, 64)`` with one hidden layer; its linears are named as a decoder's are."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.up_proj: nn.Module = _linear(generator)
        self.down_proj: nn.Module = _linear(generator)

    def forward(self, x: Tensor) -> Tensor:
        """``down(relu(up(x)))``."""
        out: Tensor = self.down_proj(F.relu(self.up_proj(x)))
        return out


class MlpShape(BaseShape):
    """A base of two linears."""

    def targets(self) -> tuple[Target, ...]:
        """Both."""
        return tuple(Target(0, module) for module in _TARGETS)


@dataclass(frozen=True)
class Outcome:
    """How an adaptation went.

    Attributes:
        losses: validation loss before the first epoch and after every tenth.
        init_seconds: making the adapter, decompositions included.
        train_seconds: all epochs.
        parameters: trained values.
    """

    losses: tuple[float, ...]
    init_seconds: float
    train_seconds: float
    parameters: int


def run_all(log: Log, seeds: Sequence[int] = SEEDS) -> None:
    """Every method and seed that is not in the log."""
    done = log.by_id("controlled")
    for seed, reading in itertools.product(seeds, (SHARED, SEPARATE)):
        for method in (FULL, *RANKS):
            name = f"controlled-{reading}-{method}-s{seed}"
            if name in done:
                continue
            outcome = adapt(method, seed, reading)
            log.append(
                "controlled",
                id=name,
                reading=reading,
                method=method,
                rank=RANKS.get(method),
                seed=seed,
                parameters=outcome.parameters,
                losses=outcome.losses,
                best_loss=min(outcome.losses),
                init_ms=round(1e3 * outcome.init_seconds, 3),
                train_ms=round(1e3 * outcome.train_seconds, 1),
                **place(),
            )


def adapt(name: str, seed: int, reading: str = SHARED, *, epochs: int = ADAPT_EPOCHS) -> Outcome:
    """Train a base with this seed, then adapt it with a method (or ``FULL``)."""
    generator = torch.Generator().manual_seed(seed)
    base = Mlp(generator)
    draw = partial(_samples, reading, generator)
    x, y = draw(TRAIN_SAMPLES, base_function, NOISE)
    _Fit(base, [*base.parameters()], BASE_LR).run(BASE_EPOCHS, x, y)
    x, y = draw(TRAIN_SAMPLES, modified_function, NOISE)
    valid = draw(VALID_SAMPLES, modified_function, 0.0)

    started = time.perf_counter()
    model = copy.deepcopy(base)
    if name == FULL:
        fit = _Fit(model, [*model.parameters()], ADAPT_LR)
    else:
        method, adapted = _attach(model, name, seed)
        parameters = [p for linear in adapted.values() for p in linear.factors().values()]
        fit = _Fit(model, parameters, ADAPT_LR, method, adapted)
    init_seconds = time.perf_counter() - started

    losses = [_loss(model, *valid)]
    started = time.perf_counter()
    for epoch in range(0, epochs, EVAL_INTERVAL):
        fit.run(min(EVAL_INTERVAL, epochs - epoch), x, y, epochs)
        losses.append(_loss(model, *valid))
    train_seconds = time.perf_counter() - started
    trained = sum(parameter.numel() for parameter in fit.parameters)
    return Outcome(tuple(losses), init_seconds, train_seconds, trained)


def base_function(x: Tensor) -> Tensor:
    """``sin(2πx)``."""
    return torch.sin(2 * math.pi * x)


def modified_function(x: Tensor) -> Tensor:
    """``sin(2πx) + 0.3 cos(3πx)``."""
    return base_function(x) + 0.3 * torch.cos(3 * math.pi * x)


def _samples(
    reading: str,
    generator: torch.Generator,
    count: int,
    function: Callable[[Tensor], Tensor],
    noise: float,
) -> tuple[Tensor, Tensor]:
    """``x`` uniform in [-1, 1] and its noisy images, both ``(count, 64)`` float32."""
    features = 1 if reading == SHARED else WIDTH
    x = (2 * torch.rand((count, features), generator=generator) - 1).expand(count, WIDTH)
    return x, function(x) + noise * torch.randn(x.shape, generator=generator)


def _linear(generator: torch.Generator) -> nn.Linear:
    """As torch starts a linear, from this generator."""
    linear = nn.Linear(WIDTH, WIDTH)
    bound = WIDTH**-0.5
    for parameter in (linear.weight, linear.bias):
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return linear


class _Fit:
    """Adam on the mean squared error of all samples at once."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        lr: float,
        method: Method | None = None,
        adapted: Mapping[Target, AdaptedLinear] | None = None,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self._method, self._adapted = method, adapted or {}
        self._optimizer = torch.optim.Adam(parameters, lr=lr)
        self._done = 0

    def run(self, epochs: int, x: Tensor, y: Tensor, in_all: int = 0) -> None:
        """Some epochs of ``in_all``."""
        for _ in range(epochs):
            self._optimizer.zero_grad()
            loss = F.mse_loss(self.model(x), y)
            penalty = self._method.penalty(self._adapted) if self._method else None
            if penalty is not None:
                loss = loss + penalty.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._done += 1
            if self._method is not None:
                self._method.after_step(self._adapted, self._done, in_all)


@torch.no_grad()
def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return F.mse_loss(model(x), y).item()


def _attach(model: Mlp, name: str, seed: int) -> tuple[Method, dict[Target, AdaptedLinear]]:
    """Put a method's adapters on both linears."""
    model.requires_grad_(False)
    linears = {Target(0, module): getattr(model, module) for module in _TARGETS}
    dims = dict.fromkeys(_TARGETS, Dims(WIDTH, WIDTH))
    config = TrainConfig(
        method=name,  # type: ignore[arg-type]
        base=Path("mlp"),
        data=Path("mlp"),
        out=Path("mlp"),
        rank=RANKS[name],
        steps=ADAPT_EPOCHS,
        seed=seed,
        targets=_TARGETS,
    )
    method = method_of(config)
    adapted: dict[Target, AdaptedLinear] = {}
    with tempfile.TemporaryDirectory() as cache:
        source = Source(
            lambda target: linears[target].weight.detach(),
            MlpShape("mlp", "0" * 64, 1, dims),
            Path(cache),
        )
        start = Start((torch.Generator().manual_seed(seed),), source)
        for target, linear in linears.items():
            adapted[target] = method.attach(linear, target, start)
            setattr(model, target.module, adapted[target])
    return method, adapted
