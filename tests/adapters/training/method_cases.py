"""Every method, with options under which the tiny base memorises its data, and its variants.

And `Trial`: an adapter on the tiny base, trained by the plainest loop there is.
"""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shoal.adapters.base import base_digest
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import METHOD_NAMES, MethodName
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all, method_of

# By method: options that learn within some forty steps.
LEARNING: dict[MethodName, dict[str, Any]] = {
    "lora": {"lr": 0.03},
    "rslora": {"lr": 0.01},
    "lora-plus": {"lr": 0.01},
    "dora": {"lr": 0.03},
    "pissa": {"lr": 0.01},
    "milora": {"lr": 0.03},
    "lora-xs": {"lr": 0.05, "rank": 8},
    "miss": {"lr": 0.02},
    "adalora": {"lr": 0.1},
    "vera": {"lr": 0.1, "rank": 24},
    "svf": {"lr": 0.5},
    "svft": {"lr": 0.1, "off_diagonals": 2},
}

# Variants beside the methods as they are by default: a name, the method, and options.
VARIANTS: dict[str, tuple[MethodName, dict[str, Any]]] = {
    "lora-xs official": ("lora-xs", {"format": "official"}),
    "lora-xs without sigma": ("lora-xs", {"no_sigma": True}),
    "lora-xs without sigma, official": ("lora-xs", {"no_sigma": True, "format": "official"}),
    "lora-xs bottom": ("lora-xs", {"vectors": "bottom"}),
    "lora-xs bottom without sigma": ("lora-xs", {"vectors": "bottom", "no_sigma": True}),
    "lora-xs randomised": ("lora-xs", {"svd": "randomised"}),
    "lora-xs random": ("lora-xs", {"init": "random", "lr": 0.01}),
    "lora-xs svd of random": ("lora-xs", {"init": "svd-of-random"}),
    "lora-xs svd of random without sigma": (
        "lora-xs",
        {"init": "svd-of-random", "no_sigma": True},
    ),
    "lora-xs orthonormal": ("lora-xs", {"init": "orthonormal"}),
    "miss by output": ("miss", {"shard": "output", "rank": 5}),
    "miss mini": ("miss", {"mini_r": 8}),
    "miss ragged": ("miss", {"rank": 5}),
    "pissa exact": ("pissa", {"svd": "exact"}),
    "pissa exact, converted": ("pissa", {"svd": "exact", "format": "converted"}),
    "milora converted": ("milora", {"format": "converted"}),
    "adalora early": ("adalora", {"tinit": 0, "tfinal": 2, "delta_t": 1, "init_rank": 8}),
    "svf z": ("svf", {"svf_vector": "z", "lr": 0.1}),
    "svft random": ("svft", {"pattern": "random"}),
    "svft top-k": ("svft", {"pattern": "top-k"}),
}

CASES: dict[str, tuple[MethodName, dict[str, Any]]] = {
    **{name: (name, LEARNING[name]) for name in METHOD_NAMES},
    **{name: (method, LEARNING[method] | more) for name, (method, more) in VARIANTS.items()},
}


def options_of(name: str) -> dict[str, Any]:
    """Options of a case for `Lab.train`; a rank of 4 where the method has one."""
    method, options = CASES[name]
    rank = {} if method in ("svf", "svft") else {"rank": 4}
    return {"method": method, **rank, **options}


@functools.cache
def _loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


_digest = functools.cache(base_digest)


def fresh(base: Path) -> Any:
    """A copy of the base's model."""
    return copy.deepcopy(_loaded(base))


class Trial:
    """Lanes of one case on a fresh copy of the base.

    Attributes:
        model: with the adapters on it.
        plain: the base's weights by target, as they were.
        losses: each step's, per lane.
    """

    def __init__(
        self,
        base: Path,
        cache: Path,
        name: str,
        seeds: Sequence[int] = (0,),
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.model = fresh(base).to(device, dtype)
        options = options_of(name)
        self.config = TrainConfig(base=base, data=base, out=cache, steps=8, **options)
        weight_of = weight_reader(self.model)
        shape = shape_of(self.model, base.stem, _digest(base))
        self.plain = {target: weight_of(target).clone() for target in shape.targets()}
        self.source = Source(self.plain.__getitem__, shape, cache)
        self.method = method_of(self.config)
        self.adapted = attach_all(self.model, self.config, self.source, seeds)
        self.seeds = seeds
        self.step = 0
        self.losses: list[Tensor] = []
        rates = self.method.rates()
        lr = self.config.learning_rate
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [factor], "lr": lr * rates.get(kind, 1.0)}
                for linear in self.adapted.values()
                for kind, factor in linear.factors().items()
            ],
            weight_decay=0.0,
        )

    def train(self, steps: int) -> None:
        """Memorise six tokens after two, in two rows a lane."""
        rows = [
            torch.randint(3, 200, (2, 8), generator=torch.Generator().manual_seed(100 + seed))
            for seed in self.seeds
        ]
        ids = torch.cat(rows).to(self.model.device)
        for _ in range(steps):
            self.optimizer.zero_grad()
            logits = self.model(input_ids=ids).logits[:, 1:-1]
            predicted = logits.float().transpose(1, 2)
            losses = F.cross_entropy(predicted, ids[:, 2:], reduction="none")
            loss = losses.view(len(self.seeds), -1).mean(dim=1)
            self.losses.append(loss.detach())
            penalty = self.method.penalty(self.adapted)
            (loss if penalty is None else loss + penalty).sum().backward()
            self.method.before_step(self.adapted)
            self.optimizer.step()
            self.step += 1
            self.method.after_step(self.adapted, self.step, self.config.steps)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """``(rows, length, vocab)``; rows are lane after lane."""
        logits: Tensor = self.model(input_ids=ids).logits
        return logits
