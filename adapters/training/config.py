"""``TrainConfig``: everything a training run was asked to do, checked once.

The command line is generated from the fields, so an option is defined here and nowhere else. It
reads no files and knows no tensors.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shoal.adapters.spec import MODULES
from shoal.adapters.training.errors import OptionRejected
from shoal.adapters.training.method_options import (
    DEFAULT_LR,
    EVERY_FORMAT,
    FORMATS,
    INITS,
    METHOD_NAMES,
    PATTERNS,
    RANK_DEFAULT,
    RANKLESS,
    SHARDS,
    SVDS,
    SVF_VECTORS,
    UNSCALED,
    VECTORS,
    MethodName,
    allocation_steps,
)

DTYPES = ("auto", "float32", "bfloat16")
SCHEDULES = ("cosine", "linear", "constant")
TOO_LONG = ("cut", "refuse")
GRAPHS = ("auto", "off")
MAX_LENGTH = 512  # by default
STEPS_MAX = 10_000_000  # the rate of each is computed before the first
SEEDS = 1 << 63  # as many as generators take
_SEED_RULE = "must not be negative, and below 2^63"

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


def option_of(*methods: MethodName, default: Any = None, help: str, **extra: Any) -> Any:
    """An option that belongs to some methods; others refuse it by name."""
    text = f"{', '.join(methods)} only: {help}"
    return option(default, text, methods=methods, **extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Raises ``OptionRejected`` on a value that breaks a rule."""

    # ruff cannot see that option() and required() are dataclasses.field() (RUF009).
    method: MethodName = required("how the adapter acts", choices=METHOD_NAMES)  # noqa: RUF009
    base: Path = required("a Hugging Face directory, a .gguf file, or the alias smollm2")  # noqa: RUF009
    data: Path = required(  # noqa: RUF009
        "records: a JSONL or Parquet file, or reasoning-gym:TASK:key=value,…"
    )
    out: Path = required("run directory; afterwards also an adapter directory")  # noqa: RUF009
    steps: int = option(200, "optimiser steps in all")
    rank: int = option(RANK_DEFAULT, "rank r of the adapter on every target; svf, svft have none")
    alpha: float | None = option(None, "the delta is scaled by alpha / rank (default: rank)")
    lr: float | None = option(None, _LR_HELP)
    batch_size: int = option(4, "records per forward pass (with --pack: rows)")
    accumulate: int = option(1, "forward passes per optimiser step")
    max_length: int = option(
        MAX_LENGTH, f"tokens per record; default: {MAX_LENGTH}, or the base's context if shorter"
    )
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
    format: str | None = option_of(
        *FORMATS,
        help="layout of the adapter. lora-xs: compact, or official (the authors'); pissa, milora: "
        "residual (rank r, and what is missing in the base by name), or converted (plain LoRA of "
        "rank 2r). The first is the default, but for a randomised pissa",
        choices=EVERY_FORMAT,
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
    basis_rank: int | None = option_of(
        "lora-xs", help="rank of the base's shared basis (default: as served)"
    )
    init: str | None = option_of(
        "lora-xs",
        help="frozen factors: svd of the weight (default), random Kaiming, svd-of-random, or "
        "orthonormal: random too, but between it and its transpose lies the weight, as with svd",
        choices=INITS,
    )
    vectors: str | None = option_of(
        "lora-xs", help="which singular vectors (default: top)", choices=VECTORS
    )
    no_sigma: bool = option_of(
        "lora-xs",
        default=False,
        help="leave the singular values out of the frozen factors",
    )
    svd: str | None = option_of(
        "lora-xs",
        "pissa",
        help="exact (default of lora-xs) or randomised (default of pissa); both are kept for the "
        "next run on the same base. Randomised lora-xs is written in the official layout, pissa "
        "in the converted one",
        choices=SVDS,
    )
    lr_ratio: float | None = option_of(
        "lora-plus", help="learning rate of B over that of A (default: 16)"
    )
    shard: str | None = option_of(
        "miss",
        help="what is shared: input (default; the efficient form, MiSS-e and PEFT's), or output",
        choices=SHARDS,
    )
    mini_r: int | None = option_of(
        "miss", help="train only so many columns, repeated over the outputs; divides all of them"
    )
    init_rank: int | None = option_of(
        "adalora", help="rank before allocation; rank is the average after (default: 1.5 rank)"
    )
    tinit: int | None = option_of("adalora", help="steps before allocation (default: steps / 10)")
    tfinal: int | None = option_of(
        "adalora", help="steps after the last allocation (default: 3 steps / 10)"
    )
    delta_t: int | None = option_of(
        "adalora", help="steps from one allocation to the next (default: 5)"
    )
    orthogonality: float | None = option_of(
        "adalora", help="weight of ‖PᵀP - I‖ + ‖QQᵀ - I‖ in the loss (default: 0.5)"
    )
    beta1: float | None = option_of("adalora", help="smoothing of the sensitivity (default: 0.85)")
    beta2: float | None = option_of("adalora", help="smoothing of its uncertainty (default: 0.85)")
    projection_seed: int | None = option_of(
        "vera", help="decides the frozen projections (default: 0)"
    )
    d_initial: float | None = option_of("vera", help="where the inner vector starts (default: 0.1)")
    svf_vector: str | None = option_of(
        "svf",
        help="train logits (default; the sum of the singular values is kept), or factors z",
        choices=SVF_VECTORS,
    )
    pattern: str | None = option_of(
        "svft", help="which entries are trained (default: banded)", choices=PATTERNS
    )
    off_diagonals: int | None = option_of(
        "svft", help="diagonals on either side; other patterns have as many entries (default: 0)"
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
        self._require("steps", self.steps <= STEPS_MAX, f"must be at most {STEPS_MAX}")
        self._require("max_length", self.max_length >= 2, "must be at least 2")
        for name in ("eval_every", "patience"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be at least 1")
        self._require(
            "patience", self.patience is None or self.eval_data is not None, "needs eval-data"
        )
        self._require("seed", 0 <= self.seed < SEEDS, _SEED_RULE)
        self._require("seeds", all(0 <= seed < SEEDS for seed in self.seeds), _SEED_RULE)
        drawn = self.projection_seed
        self._require("projection_seed", drawn is None or drawn < SEEDS, _SEED_RULE)
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
        self._check_method()

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, the method's own when none was asked for."""
        return DEFAULT_LR[self.method] if self.lr is None else self.lr

    @property
    def scale(self) -> float:
        """What multiplies the delta: ``alpha / rank`` (rsLoRA: ``alpha / √rank``).

        Alpha is the rank when none was asked for.
        """
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.method == "rslora" else alpha / self.rank

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

    def _check_method(self) -> None:
        """The options of methods: each belongs to the one asked for, and keeps its own rule."""
        method = self.method
        for spec in fields(self):
            owners = spec.metadata.get("methods")
            unasked = getattr(self, spec.name) is spec.default
            mine = owners is None or method in owners or unasked
            self._require(spec.name, mine, f"belongs to {', '.join(owners or ())}, not to {method}")
        self._require("alpha", self.alpha is None or method not in UNSCALED, f"{method} has none")
        rankless = method in RANKLESS
        self._require("rank", self.rank == RANK_DEFAULT or not rankless, f"{method} has none")
        formats = FORMATS.get(method, ())
        self._require(
            "format",
            self.format is None or self.format in formats,
            f"{method} has {' and '.join(formats)}",
        )
        for name in ("basis_rank", "init_rank"):
            value = getattr(self, name)
            self._require(name, value is None or value >= self.rank, f"rank {self.rank} needs more")
        for name, least in {
            "mini_r": 1,
            "tinit": 0,
            "tfinal": 0,
            "delta_t": 1,
            "off_diagonals": 0,
            "projection_seed": 0,
        }.items():
            value = getattr(self, name)
            self._require(name, value is None or value >= least, f"must be at least {least}")
        for name in ("lr_ratio", "d_initial"):
            value = getattr(self, name)
            self._require(
                name, value is None or (math.isfinite(value) and value > 0), "must be positive"
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < 1, "must be between 0 and 1")
        weight = self.orthogonality
        self._require(
            "orthogonality",
            weight is None or (math.isfinite(weight) and weight >= 0),
            "must not be negative",
        )
        self._check_combinations()

    def _check_combinations(self) -> None:
        """What excludes what among the options of one method."""
        drawn = self.init not in (None, "svd")
        own = drawn or self.vectors == "bottom" or self.svd == "randomised"
        if self.method == "lora-xs":
            self._require("vectors", not (drawn and self.vectors), f"init {self.init} has no order")
            self._require("svd", not (drawn and self.svd), f"init {self.init} takes none of W")
            self._require(
                "no_sigma",
                not (self.no_sigma and self.init in ("random", "orthonormal")),
                f"init {self.init} has no singular values",
            )
            self._require(
                "svd",
                not (self.svd == "randomised" and self.vectors == "bottom"),
                "finds top vectors alone",
            )
            self._require(
                "format",
                not (own and self.format == "compact"),
                "holds only what lies on the base's shared basis",
            )
        if self.method == "pissa":
            randomised = self.svd != "exact"
            self._require(
                "format",
                not (randomised and self.format == "residual"),
                "needs svd exact: what a randomised one took from the base cannot be found again",
            )
        if self.method == "adalora":
            first, last = allocation_steps(self.steps, self.tinit, self.tfinal)
            self._require(
                "tinit" if self.tfinal is None else "tfinal",
                first + last < self.steps,
                f"leaves none of {self.steps} steps for allocation: {first} before, {last} after",
            )
        both = self.mini_r is not None and self.shard == "output"
        self._require("mini_r", not both, "has no output shards")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise OptionRejected(name.replace("_", "-"), getattr(self, name), rule)
