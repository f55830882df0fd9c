"""Device code of ``add_rms_norm``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def normalise(x, weight_ptr, col, inside, n, eps, PLUS_ONE: tl.constexpr):
    """RMS norm of one row, whose elements beyond n are zero."""
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / n + eps) * weight


@triton.jit
def add_rms_norm_kernel(
    residual_ptr,
    delta_ptr,
    branch_ptr,
    bias_ptr,
    delta_weight_ptr,
    weight_ptr,
    out_ptr,
    n,
    residual_stride,
    delta_stride,
    branch_stride,
    eps,
    PLUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program finishes one row, whole in registers. It reads nothing before it waits."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < n
    if PDL:
        gdc_wait()
    x = tl.load(residual_ptr + token * residual_stride + col, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + token * delta_stride + col, mask=inside, other=0.0)
        delta = delta.to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + token * branch_stride + col, mask=inside, other=0.0)
            delta += branch.to(tl.float32)
        if bias_ptr is not None:
            delta += tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
        if delta_weight_ptr is not None:
            delta = normalise(delta, delta_weight_ptr, col, inside, n, eps, PLUS_ONE)
        # The norm is that of the residual as it is stored.
        rounded = (x + delta).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + token * residual_stride + col, rounded, mask=inside)
        x = rounded.to(tl.float32)
    result = normalise(x, weight_ptr, col, inside, n, eps, PLUS_ONE)
    tl.store(out_ptr + token * n + col, result.to(out_ptr.dtype.element_ty), mask=inside)
