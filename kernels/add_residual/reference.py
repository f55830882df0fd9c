"""What ``add_residual`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from shoal.kernels.core_apply.epilogue import Epilogue, epilogue_reference


def add_residual_reference(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    core: Epilogue | None,
    part: int,
) -> tuple[Tensor, Tensor]:
    """See ``shoal.kernels.add_residual.kernel.add_residual``; float32 inside, any device.

    Args:
        part: how many columns one row of the sums covers.

    Returns:
        x and sums, both float32.
    """
    n = residual.shape[1]
    if delta is not None:
        added = residual.float() + delta[:, :n].float()
        if core is not None:
            epilogue_reference(added, delta, core, (n,))
        if bias is not None:
            added += bias.float()
        residual.copy_(added)
    stored = residual.float()
    squares = F.pad(stored.square(), (0, -n % part)).view(stored.shape[0], -(-n // part), part)
    return stored * weight.float(), squares.sum(dim=2).t()
