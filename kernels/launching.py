"""What the launchers share: supported dtypes, the guard around Triton, and how ``tl.dot`` computes.

Owns no kernel. Triton itself is imported only by the ``jit.py`` files, and those only when a
kernel is launched: a CPU server never loads it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from shoal.kernels.errors import TritonMissing

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How to launch: tokens and outputs per program. Where ``tl.dot`` runs, both at least 16."""

    tile: int
    block_n: int
    num_warps: int


@functools.cache  # looking a package up takes longer than a launch
def require_triton() -> None:
    """Explain a missing Triton before the import of a kernel would fail.

    Raises:
        TritonMissing: the package is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise TritonMissing(
            "GPU adapters need Triton, which is not installed: pip install 'triton>=3.5'"
        )


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU; decided before the first kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_runs_on(device: torch.device) -> bool:
    """Whether a launch works there: on a GPU, or on a CPU in the interpreter."""
    return device.type != "cpu" or interpreting()


@functools.cache
def _overlaps(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def overlap_options(device: torch.device, early: bool) -> dict[str, bool]:
    """Options of a launch that may begin while the kernel before it still runs (Hopper and later).

    Such a kernel reads what no kernel of the step writes (addresses, ranks, arena, basis,
    weights), and then waits (PDL, ``gdc_wait``) until everything before it in the stream has
    ended and its writes are visible. That is safe under three rules, which every kernel here keeps:

    - Every load of what a kernel may have written, and every store, comes after the wait: a buffer
      that is used again is neither read too early nor overwritten while it is still read.
    - Every program waits, and none lets its successor start before it has waited itself (no
      ``gdc_launch_dependents``). So when a kernel starts, everything but its direct predecessor
      has ended, and what is read early can only meet a write of that one. (A library's GEMM may
      let its successor start at once; it writes nothing that is read early.)
    - A call whose direct predecessor writes what is read early (the copies that begin a step)
      takes ``early=False`` and starts after it.
    """
    if early and _overlaps(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def dot_in_float32(*dtypes: torch.dtype) -> bool:
    """Whether the kernel must convert the operands of ``tl.dot`` to float32.

    True when every operand is float32 already, and in the interpreter for bfloat16, whose
    arithmetic is silently wrong there (errors of 1e10 and more) while loads and conversions
    are right.
    """
    if interpreting() and torch.bfloat16 in dtypes:
        return True
    return all(dtype == torch.float32 for dtype in dtypes)


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``value`` and at least ``least``."""
    return max(least, 1 << max(0, value - 1).bit_length())
