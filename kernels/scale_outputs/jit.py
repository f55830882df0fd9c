"""Device code of ``scale_outputs``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["offset"])
def scale_outputs_kernel(
    y_ptr,
    arena_ptr,
    addresses_ptr,
    n,
    offset,
    y_stride,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program scales BLOCK_N outputs of one token; without an address it ends at once."""
    token = tl.program_id(0).to(tl.int64)
    address = tl.load(addresses_ptr + token)
    if address >= 0:
        col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = col < n
        start = tl.multiple_of(address + offset, ALIGN)
        change = tl.load(arena_ptr + start + col, mask=inside, other=0.0).to(tl.float32)
        y_row = y_ptr + token * y_stride
        y = tl.load(y_row + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_row + col, (y * (1.0 + change)).to(y_ptr.dtype.element_ty), mask=inside)
