"""The methods by name, and which options belong to which.

Pure, so that the command line can say what there is without loading a tensor library. The fields
themselves are in ``config.py``: those with ``methods`` in their metadata are options of these
methods alone, are None (or False) unless asked for, and default to what the method's class says.
"""

from collections.abc import Mapping
from typing import Literal, get_args

MethodName = Literal[
    "lora",
    "rslora",
    "lora-plus",
    "dora",
    "pissa",
    "milora",
    "lora-xs",
    "miss",
    "adalora",
    "vera",
    "svf",
    "svft",
]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)

# AdamW step sizes that learn without diverging when the option is left out. LoRA-XS: the paper's
# 1e-3 .. 5e-3. MiSS sums d_in / r inputs without scaling, so it wants a small one. rsLoRA's deltas
# are √r times LoRA's, and LoRA+ trains B sixteen times as fast. What starts at the weights' own
# singular vectors moves the base with every step (PiSSA). VeRA trains factors of random
# projections, SVF logits, SVFT coordinates of single directions: large steps for little change.
DEFAULT_LR: Mapping[MethodName, float] = {
    "lora": 5e-4,
    "rslora": 2e-4,
    "lora-plus": 2e-4,
    "dora": 5e-4,
    "pissa": 2e-4,
    "milora": 5e-4,
    "lora-xs": 2e-3,
    "miss": 2e-4,
    "adalora": 5e-3,
    "vera": 2e-2,
    "svf": 2e-2,
    "svft": 1e-2,
}

# Methods whose delta has no factor alpha / rank, and those that have no rank.
UNSCALED: frozenset[MethodName] = frozenset({"miss", "vera", "svf", "svft"})
RANKLESS: frozenset[MethodName] = frozenset({"svf", "svft"})
RANK_DEFAULT = 16

# The layouts in which a method can be written; the first is the default.
FORMATS: Mapping[MethodName, tuple[str, ...]] = {
    "lora-xs": ("compact", "official"),
    "pissa": ("residual", "converted"),
    "milora": ("residual", "converted"),
}
EVERY_FORMAT = tuple(dict.fromkeys(name for names in FORMATS.values() for name in names))

INITS = ("svd", "random", "svd-of-random", "orthonormal")
VECTORS = ("top", "bottom")
SVDS = ("exact", "randomised")
SHARDS = ("input", "output")
PATTERNS = ("banded", "random", "top-k")
SVF_VECTORS = ("logits", "z")


def allocation_steps(steps: int, tinit: int | None, tfinal: int | None) -> tuple[int, int]:
    """AdaLoRA's steps before the first allocation and after the last, with their defaults."""
    return (
        steps // 10 if tinit is None else tinit,
        3 * steps // 10 if tfinal is None else tfinal,
    )
