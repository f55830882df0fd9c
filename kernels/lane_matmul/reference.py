"""What ``lane_matmul`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor


def lane_matmul_reference(
    x: Tensor, bank: Tensor, owners: Tensor, out: Tensor, *, scale: float, add: bool
) -> None:
    """See ``shoal.kernels.lane_matmul.kernel.lane_matmul``; float32, any device.

    One batched product with a row's own matrices each.
    """
    used = (owners >= 0).nonzero().squeeze(1)
    everyone = used.numel() == owners.numel()
    chosen = bank.index_select(0, owners if everyone else owners[used])
    product = torch.matmul((x if everyone else x[used]).transpose(1, 2).float(), chosen.float())
    product = product.transpose(1, 2)
    if scale != 1:
        product *= scale
    if everyone:
        out.copy_(product.add_(out) if add else product)
        return
    if not add:
        out.zero_()
    out[used] = (out[used] + product).to(out.dtype)
