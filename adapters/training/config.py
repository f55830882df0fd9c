"""``TrainConfig``: everything a training run was asked to do, checked once.

The command line is generated from the fields, so an option is defined here and nowhere else. It
reads no files and knows no tensors.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from shoal.adapters.spec import MODULES
from shoal.adapters.training.errors import OptionRejected

MethodName = Literal["lora-xs", "miss", "lora"]
METHOD_NAMES: tuple[MethodName, ...] = ("lora-xs", "miss", "lora")
FORMATS = ("compact", "official")
DTYPES = ("auto", "float32", "bfloat16")
SCHEDULES = ("cosine", "linear", "constant")
TOO_LONG = ("cut", "refuse")
GRAPHS = ("auto", "off")

# AdamW step sizes that learn without diverging when the option is left out. LoRA-XS: the paper's
# 1e-3 .. 5e-3. MiSS sums d_in / r inputs without scaling, so it wants the smallest.
DEFAULT_LR: dict[MethodName, float] = {"lora-xs": 2e-3, "miss": 2e-4, "lora": 5e-4}
_LR_HELP = (
    "peak learning rate (default: "
    + ", ".join(f"{method} {rate:g}" for method, rate in DEFAULT_LR.items())
    + ")"
)


def option(default: Any, help: str, **extra: Any) -> Any:
    """A field with a default, its help text, and what argparse must know besides."""
    return field(default=default, metadata={"help": help, **extra})


def required(help: str, **extra: Any) -> Any:
    """A field that has no default."""
    return field(metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Raises ``OptionRejected`` on a value that breaks a rule."""

    # ruff cannot see that option() and required() are dataclasses.field() (RUF009).
    method: MethodName = required("how the adapter acts", choices=METHOD_NAMES)  # noqa: RUF009
    base: Path = required("a Hugging Face directory, a .gguf file, or the alias smollm2")  # noqa: RUF009
    data: Path = required("JSONL: one chat or prompt/completion record a line")  # noqa: RUF009
    out: Path = required("run directory; afterwards also an adapter directory")  # noqa: RUF009
    steps: int = option(200, "optimiser steps in all")
    rank: int = option(16, "rank r of the adapter on every target")
    alpha: float | None = option(None, "the delta is scaled by alpha / rank (default: rank)")
    lr: float | None = option(None, _LR_HELP)
    batch_size: int = option(4, "records per forward pass (with --pack: rows)")
    accumulate: int = option(1, "forward passes per optimiser step")
    max_length: int = option(512, "tokens per record")
    too_long: str = option(
        "cut",
        "what happens to longer records: they lose their end, or are refused",
        choices=TOO_LONG,
    )
    pack: bool = option(False, "lay several short records in one row of max-length tokens")
    seed: int = option(0, "decides the initial values and the order of the data")
    seeds: tuple[int, ...] = option(
        (), "train one adapter a seed side by side, into OUT/seed-N; separated by commas"
    )
    targets: tuple[str, ...] = option(MODULES, "linears to adapt, separated by commas")
    format: str | None = option(
        None, "lora-xs only: compact (default), or official (the authors' layout)", choices=FORMATS
    )
    warmup: float = option(0.06, "share of the steps over which the learning rate rises")
    schedule: str = option("cosine", "how the learning rate falls afterwards", choices=SCHEDULES)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    clip: float = option(1.0, "largest norm of the gradient; larger ones are scaled down")
    eval_data: Path | None = option(None, "records to measure the loss on")  # noqa: RUF009
    eval_every: int | None = option(
        None, "steps between measurements on eval-data (default: save-every)"
    )
    patience: int | None = option(
        None, "stop after so many measurements without a better one, and keep the best values"
    )
    save_every: int = option(50, "steps between checkpoints")
    basis_rank: int | None = option(
        None, "lora-xs only: rank of the base's shared basis (default: as served)"
    )
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "of the base; auto: float32 on cpu, else bfloat16", choices=DTYPES)
    checkpoint_activations: bool = option(
        False, "compute activations again in the backward pass; less memory, a third more time"
    )
    graphs: str = option(
        "auto", "auto: replay steps from CUDA graphs where there is CUDA", choices=GRAPHS
    )
    resume: bool = option(False, "go on from the run directory's checkpoint")
    overwrite: bool = option(False, "replace an earlier run in the run directory")

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("steps", "rank", "batch_size", "accumulate", "save_every"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("max_length", self.max_length >= 2, "must be at least 2")
        for name in ("eval_every", "patience"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be at least 1")
        self._require(
            "patience", self.patience is None or self.eval_data is not None, "needs eval-data"
        )
        self._require("seed", self.seed >= 0, "must not be negative")
        self._require("seeds", all(seed >= 0 for seed in self.seeds), "must not be negative")
        distinct = len(set(self.seeds)) == len(self.seeds)
        self._require("seeds", distinct, "names a seed twice")
        for name in ("alpha", "lr", "clip"):
            value = getattr(self, name)
            positive = value is None or (math.isfinite(value) and value > 0)
            self._require(name, positive, "must be a positive number")
        self._require("warmup", 0 <= self.warmup < 1, "must be at least 0 and below 1")
        decay = self.weight_decay
        self._require("weight_decay", math.isfinite(decay) and decay >= 0, "must not be negative")
        self._require("targets", len(self.targets) > 0, "must name at least one linear")
        self._require("overwrite", not (self.resume and self.overwrite), "excludes resume")
        if self.method == "miss":
            self._require("alpha", self.alpha is None, "MiSS has no scale; leave it out")
        if self.method != "lora-xs":
            self._require("format", self.format is None, f"{self.method} has only one format")
            self._require("basis_rank", self.basis_rank is None, "belongs to lora-xs")
        elif self.basis_rank is not None:
            self._require(
                "basis_rank", self.basis_rank >= self.rank, f"rank {self.rank} needs more"
            )

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, the method's own when none was asked for."""
        return DEFAULT_LR[self.method] if self.lr is None else self.lr

    @property
    def scale(self) -> float:
        """What multiplies the delta: ``alpha / rank``, and 1 when no alpha was asked for."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def evaluation_interval(self) -> int:
        """Steps between measurements on the evaluation data."""
        return self.save_every if self.eval_every is None else self.eval_every

    @property
    def warmup_steps(self) -> int:
        """Steps with a rising learning rate."""
        return round(self.warmup * self.steps)

    def _check_choices(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            choices = spec.metadata.get("choices")
            allowed = choices is None or value in choices or (value is None and not spec.default)
            self._require(spec.name, allowed, f"must be one of {', '.join(choices or ())}")
        unknown = [name for name in self.targets if name not in MODULES]
        self._require("targets", not unknown, f"{unknown} not among {', '.join(MODULES)}")
        repeated = len(set(self.targets)) < len(self.targets)
        self._require("targets", not repeated, "names a linear twice")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise OptionRejected(name.replace("_", "-"), getattr(self, name), rule)
