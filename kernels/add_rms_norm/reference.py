"""What ``add_rms_norm`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def add_rms_norm_reference(
    residual: Tensor,
    weight: Tensor,
    eps: float,
    delta: Tensor | None = None,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    delta_weight: Tensor | None = None,
    plus_one: bool = False,
) -> Tensor:
    """See ``shoal.kernels.add_rms_norm.kernel.add_rms_norm``; float32 inside, any device."""
    n = residual.shape[1]
    offset = 1.0 if plus_one else 0.0
    if delta is not None:
        added = delta[:, :n].float()
        if branch is not None:
            added = added + branch.float()
        if bias is not None:
            added = added + bias.float()
        if delta_weight is not None:
            added = F.rms_norm(added, (n,), delta_weight.float() + offset, eps)
        residual.copy_(residual.float() + added)
    return F.rms_norm(residual.float(), (n,), weight.float() + offset, eps).to(residual.dtype)
