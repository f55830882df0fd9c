"""The device bank: every resident adapter in one flat tensor, and their use in a mixed step.

``AdapterBank`` owns the arena and the bases on the device. It does not decide what is resident
(``slots.py`` does) nor what a family computes (``families/`` does). ``StepAdapters`` belongs to one
step: which tokens use which records, worked out once and applied after every fused GEMM.
"""

import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from shoal.adapters.basis import Basis
from shoal.adapters.families.core import CoreBasis, CorePart
from shoal.adapters.families.fold import FoldPart
from shoal.adapters.families.kernel_parts import KernelCorePart, KernelFoldPart, KernelLoraPart
from shoal.adapters.families.lora import LoraPart
from shoal.adapters.families.tiles import Records, Segment
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.spec import BaseShape, Group, RowAdapter
from shoal.kernels.core_apply.kernel import MAX_RANK as CORE_KERNEL_RANK_MAX

# Extents are multiples of this. 1024 wastes 4 % on a rank-8 LoRA-XS of a 30-layer base (13,440
# elements), and keeps records aligned for vector loads.
UNIT_ELEMENTS = 1024


# Segments of one family by rank, in token order.
_ByRank = dict[int, list[Segment]]


class StepPart(Protocol):
    """The tokens of a step that one family treats alike."""

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None: ...


class StepAdapters:
    """The adapters of one step. Valid until a slot it uses is loaded with something else."""

    def __init__(self, parts: Sequence[StepPart], num_tokens: int) -> None:
        self._parts = tuple(parts)
        self._num_tokens = num_tokens

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add every token's adapter delta to ``y`` in place.

        Args:
            x: ``(tokens, d_in)``, the input of the group's fused GEMM.
            y: ``(tokens, n_group)``, its bias-free output ``y0``; rows without an adapter keep
                their bits. Must not require grad.
        """
        assert x.shape[0] == y.shape[0] == self._num_tokens
        for part in self._parts:
            part.apply(layer, group, x, y)


class AdapterBank:
    """All resident adapters of a device: one arena of units, and the bases they need.

    ``load`` and ``step`` belong to the engine thread; ``add_basis`` and ``has_basis`` may be called
    from any thread.
    """

    def __init__(
        self,
        shape: BaseShape,
        *,
        capacity_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: bool | None = None,
    ) -> None:
        """Allocate the arena.

        Args:
            capacity_bytes: for the arena; bases come on top.
            dtype: of the arena, float32 on a CPU and the model's on CUDA.
            kernels: whether steps run through ``shoal.kernels`` or in plain torch; by default
                the kernels on CUDA when Triton is installed.
        """
        unit_bytes = UNIT_ELEMENTS * dtype.itemsize
        self.num_units = capacity_bytes // unit_bytes
        if self.num_units < 1:
            raise ValueError(f"capacity_bytes is {capacity_bytes}, must be >= {unit_bytes}")
        self.shape = shape
        self.device = torch.device(device)
        self.dtype = dtype
        if kernels is None:
            kernels = self.device.type == "cuda" and find_spec("triton") is not None
        self.kernels = kernels
        # Not cleared: what no record has been loaded into is never read.
        arena = torch.empty(self.num_units * UNIT_ELEMENTS, device=self.device, dtype=dtype)
        self._records = Records(arena, UNIT_ELEMENTS)
        self._bases: dict[str, CoreBasis] = {}
        self._bases_lock = threading.Lock()
        self._last_rows: list[tuple[RowAdapter | None, int]] | None = None
        self._last_step: StepAdapters | None = None

    @property
    def arena(self) -> Tensor:
        """All units, ``(num_units * UNIT_ELEMENTS,)``, for whoever fills it other than by ``load``.

        Such a caller keeps away from it while a step that reads it is under way.
        """
        return self._records.arena

    def add_basis(self, basis: Basis) -> None:
        """Bring a basis to the device; nothing happens when it is there already."""
        with self._bases_lock:
            if basis.id not in self._bases:
                self._bases[basis.id] = CoreBasis(
                    basis.factors,
                    basis.rank,
                    self.shape,
                    self.device,
                    self.dtype,
                    rank_major=not self.kernels,
                )

    def has_basis(self, basis_id: str) -> bool:
        """Whether ``core`` adapters on this basis can be applied."""
        return basis_id in self._bases

    def load(self, adapter: RowAdapter, packed: PackedAdapter) -> None:
        """Copy a record into its slot: one contiguous copy, asynchronous on CUDA."""
        assert packed.spec == adapter.spec
        assert packed.data.dtype == self.dtype
        elements = packed.data.numel()
        slot = adapter.slot
        assert elements <= slot.num_units * UNIT_ELEMENTS
        assert slot.unit + slot.num_units <= self.num_units
        self._last_rows = None  # the last step may have read the slot
        extent = self._records.arena.narrow(0, slot.unit * UNIT_ELEMENTS, elements)
        extent.copy_(packed.data, non_blocking=True)

    def step(self, rows: Sequence[tuple[RowAdapter | None, int]]) -> StepAdapters | None:
        """Work out which tokens use which record.

        Args:
            rows: each row's adapter (loaded, its basis added) and number of tokens, in the order
                in which the rows' tokens are concatenated.

        Returns:
            What to apply after each GEMM, or None when no row has an adapter. The same object as
            before when neither the rows nor the bank have changed: decode steps repeat.
        """
        rows = list(rows)
        if rows != self._last_rows:
            self._last_step = self._build(rows)
            self._last_rows = rows
        return self._last_step

    def _build(self, rows: Sequence[tuple[RowAdapter | None, int]]) -> StepAdapters | None:
        """``step`` without the memory of the last one."""
        cores: dict[str, _ByRank] = {}
        folds: _ByRank = {}
        loras: _ByRank = {}
        start = 0
        for adapter, num_tokens in rows:
            if adapter is not None and adapter.spec.rank > 0 and num_tokens > 0:
                spec = adapter.spec
                if spec.family == "core":
                    assert spec.basis_id is not None
                    by_rank = cores.setdefault(spec.basis_id, {})
                else:
                    by_rank = folds if spec.family == "fold" else loras
                segment = Segment(adapter.slot.unit, start, num_tokens)
                by_rank.setdefault(spec.rank, []).append(segment)
            start += num_tokens
        if not (cores or folds or loras):
            return None
        make = self._kernel_parts if self.kernels else self._torch_parts
        return StepAdapters(make(cores, folds, loras), start)

    def _torch_parts(
        self, cores: dict[str, _ByRank], folds: _ByRank, loras: _ByRank
    ) -> list[StepPart]:
        shape, records = self.shape, self._records
        parts: list[StepPart] = [
            CorePart(segments, rank, self._bases[basis_id], shape, records)
            for basis_id, by_rank in cores.items()
            for rank, segments in by_rank.items()
        ]
        if folds:
            parts.append(FoldPart(folds, shape, records))
        parts += [LoraPart(segments, rank, shape, records) for rank, segments in loras.items()]
        return parts

    def _kernel_parts(
        self, cores: dict[str, _ByRank], folds: _ByRank, loras: _ByRank
    ) -> list[StepPart]:
        shape, records = self.shape, self._records
        parts: list[StepPart] = []
        for basis_id, by_rank in cores.items():
            basis = self._bases[basis_id]
            small = {r: own for r, own in by_rank.items() if r <= CORE_KERNEL_RANK_MAX}
            if small:
                parts.append(KernelCorePart(small, basis, shape, records))
            parts += [
                CorePart(segments, rank, basis, shape, records)
                for rank, segments in by_rank.items()
                if rank not in small
            ]
        parts += [KernelFoldPart(own, rank, shape, records) for rank, own in folds.items()]
        parts += [KernelLoraPart(own, rank, shape, records) for rank, own in loras.items()]
        return parts
