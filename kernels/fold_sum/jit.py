"""Device code of ``fold_sum``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def fold_sum_kernel(
    x_ptr,
    out_ptr,
    width,
    rank,
    x_stride,
    RANK: tl.constexpr,
    FOLDS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program folds one token: ``FOLDS`` groups of ``rank`` elements per step.

    EXACT says that ``rank`` is ``RANK``. The compiler then sees that a step is one contiguous
    range, and loads 16 bytes at a time whatever the rank; else it does so only for ranks that
    are multiples of 16.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, RANK)
    group = tl.arange(0, FOLDS)
    acc = tl.zeros((FOLDS, RANK), dtype=tl.float32)
    folded = RANK if EXACT else rank
    for first in range(0, width, FOLDS * folded):
        at = first + group[:, None] * folded + i[None, :]
        inside = at < width
        if not EXACT:
            inside = inside & (i < rank)[None, :]
        x = tl.load(x_ptr + token * x_stride + at, mask=inside, other=0.0)
        acc += x.to(tl.float32)
    tl.store(out_ptr + token * rank + i, tl.sum(acc, axis=0), mask=i < rank)
