"""What ``silu_mul`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.kernels.core_apply.epilogue import (
    Epilogue,
    RowScale,
    epilogue_reference,
    scale_reference,
)

Activation = Literal["silu", "gelu_tanh", "gelu"]


def silu_mul_reference(
    gate_up: Tensor,
    width: int,
    activation: Activation = "silu",
    bias: Tensor | None = None,
    core: Epilogue | None = None,
    scale: RowScale | None = None,
) -> Tensor:
    """See ``shoal.kernels.silu_mul.kernel.silu_mul``; float32 inside, any device."""
    y = gate_up[:, : 2 * width].float()
    if core is not None:
        y = y.clone() if y.dtype == gate_up.dtype else y
        epilogue_reference(y, gate_up, core, (width, width))
    if scale is not None:
        y = scale_reference(y, scale)
    if bias is not None:
        y = y + bias.float()
    gate, up = torch.split(y, width, dim=1)
    if activation == "silu":
        acted = F.silu(gate)
    else:
        acted = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (acted * up).to(gate_up.dtype)
