"""Every method, with options under which the tiny base memorises its data, and its variants."""

from typing import Any

from shoal.adapters.training.method_options import METHOD_NAMES, MethodName

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
