"""Device code of ``fold_sum``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def fold_sum_kernel(
    x_ptr,
    ranks_ptr,
    out_ptr,
    width,
    x_stride,
    out_stride,
    RANK: tl.constexpr,
    FOLDS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """One program folds one token by its own rank, at most RANK.

    A rank that is RANK halved some times folds the fold by RANK once more: then a step is one
    contiguous range whatever the rank, which loads 16 bytes at a time. ``1 << HALVINGS`` is RANK.
    Other ranks take ``FOLDS`` groups of ``rank`` elements per step.
    """
    token = tl.program_id(0).to(tl.int64)
    rank = tl.load(ranks_ptr + token)
    i = tl.arange(0, RANK)
    group = tl.arange(0, FOLDS)
    x_row = x_ptr + token * x_stride
    out_row = out_ptr + token * out_stride
    if rank > 0:
        acc = tl.zeros((FOLDS, RANK), dtype=tl.float32)
        if RANK % rank == 0:
            for first in range(0, width, FOLDS * RANK):
                at = first + group[:, None] * RANK + i[None, :]
                acc += tl.load(x_row + at, mask=at < width, other=0.0).to(tl.float32)
            folded = tl.sum(acc, axis=0)
            for halving in tl.static_range(HALVINGS + 1):
                if rank == RANK >> halving:
                    again = tl.reshape(folded, (1 << halving, RANK >> halving))
                    tl.store(out_row + tl.arange(0, RANK >> halving), tl.sum(again, axis=0))
        else:
            for first in range(0, width, FOLDS * rank):
                at = first + group[:, None] * rank + i[None, :]
                inside = (at < width) & (i < rank)[None, :]
                acc += tl.load(x_row + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out_row + i, tl.sum(acc, axis=0), mask=i < rank)
