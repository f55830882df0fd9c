"""What ``scale_outputs`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_outputs_reference(y: Tensor, arena: Tensor, addresses: Tensor, offset: int) -> None:
    """See ``shoal.kernels.scale_outputs.kernel.scale_outputs``; any device."""
    used = (addresses >= 0).nonzero().squeeze(1)
    columns = torch.arange(y.shape[1], device=y.device)
    factors = arena[addresses[used][:, None] + offset + columns].float() + 1.0
    y[used] = (y[used].float() * factors).to(y.dtype)
