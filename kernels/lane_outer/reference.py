"""What ``lane_outer`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.lane_rows import LaneRows


def lane_outer_reference(
    a: Tensor, b: Tensor, rows: LaneRows, grads: Tensor, *, scale: float
) -> None:
    """See ``shoal.kernels.lane_outer.kernel.lane_outer``; float32, any device.

    One batched product when all lanes have equally many rows, side by side; else one a lane.
    """
    for module in range(a.shape[2]):
        _one_module(a[:, :, module], b[:, :, module], rows, grads[:, module], scale)


def _one_module(a: Tensor, b: Tensor, rows: LaneRows, grads: Tensor, scale: float) -> None:
    a, b = a.float(), b.float()
    used = [s for s in zip(*(part.tolist() for part in rows[1:]), strict=True) if s[1]]
    if not used:
        return
    first, count, _ = used[0]
    if all(segment[:2] == (first + i * count, count) for i, segment in enumerate(used)):
        end = first + len(used) * count
        left = a[first:end].reshape(len(used), -1, a.shape[2])
        right = b[first:end].reshape(len(used), -1, b.shape[2])
        products = torch.bmm(left.transpose(1, 2), right)
        lanes = [lane for _, _, lane in used]
        grads[lanes] = products.mul_(scale) if scale != 1 else products
        return
    for first, count, lane in used:
        left = a[first : first + count].reshape(-1, a.shape[2])
        grads[lane] = (left.T @ b[first : first + count].reshape(-1, b.shape[2])) * scale
