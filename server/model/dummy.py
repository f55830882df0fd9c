"""A decoder of random weights: exact shapes, seconds to make, nothing to download.

What a step costs does not depend on the weights' values, so benchmarks need no others. Its basis is
random, too, and how large random adapters should be is said here.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Literal

import torch

from shoal.adapters.basis import Basis
from shoal.adapters.random_basis import random_basis
from shoal.adapters.spec import BaseShape
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder

# Families that random adapters are made of.
DummyFamily = Literal["core", "fold", "lora"]

WEIGHT_STD = 0.02
# Deltas about half as large as what they are added to: large enough to change greedy tokens, small
# enough to keep activations where they are.
DELTA = 0.5


def random_decoder(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    spare_rows: int = 0,
) -> Decoder:
    """Weights at the scale of an untrained model: activations stay finite at any depth.

    They are drawn on the device, one after the other; the same device, dtype and seed give the
    same weights.

    Args:
        spare_rows: see ``Decoder``.
    """
    decoder = Decoder(config, device=device, dtype=dtype, spare_rows=spare_rows)
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in decoder.weight_shapes().items():
        if name.endswith("norm.weight"):
            weight = torch.full(shape, 0.0 if config.norm_plus_one else 1.0, device=device)
        else:
            weight = torch.empty(shape, device=device, dtype=dtype)
            weight.normal_(0.0, WEIGHT_STD, generator=generator)
        decoder.load_weight(name, weight)
    return decoder


def dummy_basis(
    config: ModelConfig,
    name: str,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[BaseShape, Basis]:
    """What adapters of random weights must fit, and the basis that they share.

    The same for the same arguments (``name`` aside) on the same kind of device: whoever makes
    adapters for a server without weights draws the basis that it will draw.

    Args:
        name: the base's served name.
        rank: of the basis; one of another rank is another basis.
        dtype: what the model runs in.
        progress: see ``random_basis``.
    """
    shape = config.base_shape(name, dummy_digest(config, device, dtype))
    return shape, random_basis(shape, rank, device, progress=progress)


def dummy_digest(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Identity of random weights: neither their basis nor their adapters are the real base's."""
    return hashlib.sha256(f"dummy {device.type} {dtype} {config}".encode()).hexdigest()


def adapter_std(family: DummyFamily, rank: int) -> float:
    """Standard deviation of an adapter's numbers that makes its deltas ``DELTA`` of the outputs."""
    if family == "core":  # R (r, r) turns r projections into r
        return DELTA / math.sqrt(rank)
    if family == "fold":  # r sums of d_in / r inputs, like d_in inputs
        return DELTA * WEIGHT_STD
    return math.sqrt(DELTA * WEIGHT_STD / math.sqrt(rank))  # lora: the same in A and in B
