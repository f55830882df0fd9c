"""What ``core_project`` and ``core_mix`` mean, in plain torch; also how they run on a CPU."""

from __future__ import annotations

from torch import Tensor

from shoal.kernels.core_apply.epilogue import CoreRows, mix_reference, unchunk


def core_project_reference(
    x: Tensor, projection: Tensor, rows: CoreRows, modules: int, matrix: int
) -> Tensor:
    """See ``shoal.kernels.core_project.kernel.core_project``; one split, any device."""
    h = x.float() @ projection[: modules * rows.columns].float().t()
    return mix_reference(unchunk(h, modules, rows.columns), rows, matrix)[None]


def core_mix_reference(
    y: Tensor, h_column: int, rows: CoreRows, modules: int, matrix: int
) -> Tensor:
    """See ``shoal.kernels.core_project.kernel.core_mix``; float32 inside, any device."""
    h = y[:, h_column : h_column + modules * rows.columns]
    return mix_reference(unchunk(h, modules, rows.columns), rows, matrix)[None]
