"""The device bank: every resident adapter in one flat tensor, and their use in a mixed step.

``AdapterBank`` owns the arena and the bases on the device. It does not decide what is resident
(``slots.py`` does) nor what a family computes (``families/`` does). ``StepAdapters`` belongs to one
step: which tokens use which records, worked out once and applied after every fused GEMM.
"""

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.adapters.basis import Basis
from shoal.adapters.families.core import CoreBasis, CorePart
from shoal.adapters.families.fold import FoldPart
from shoal.adapters.families.lora import LoraPart
from shoal.adapters.families.tiles import Records, Segment
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.spec import BaseShape, Group, RowAdapter

# Extents are multiples of this. 1024 wastes 4 % on a rank-8 LoRA-XS of a 30-layer base (13,440
# elements), and keeps records aligned for vector loads.
UNIT_ELEMENTS = 1024


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
        self, shape: BaseShape, *, capacity_bytes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Allocate the arena.

        Args:
            capacity_bytes: for the arena; bases come on top.
            dtype: of the arena, float32 on a CPU and the model's on CUDA.
        """
        unit_bytes = UNIT_ELEMENTS * dtype.itemsize
        self.num_units = capacity_bytes // unit_bytes
        if self.num_units < 1:
            raise ValueError(f"capacity_bytes is {capacity_bytes}, must be >= {unit_bytes}")
        self.shape = shape
        self.device = torch.device(device)
        self.dtype = dtype
        # Not cleared: what no record has been loaded into is never read.
        arena = torch.empty(self.num_units * UNIT_ELEMENTS, device=self.device, dtype=dtype)
        self._records = Records(arena, UNIT_ELEMENTS)
        self._bases: dict[str, CoreBasis] = {}
        self._bases_lock = threading.Lock()
        self._last_rows: list[tuple[RowAdapter | None, int]] | None = None
        self._last_step: StepAdapters | None = None

    def add_basis(self, basis: Basis) -> None:
        """Bring a basis to the device; nothing happens when it is there already."""
        with self._bases_lock:
            if basis.id not in self._bases:
                self._bases[basis.id] = CoreBasis(
                    basis.factors, basis.rank, self.shape, self.device, self.dtype
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
        cores: dict[tuple[int, str], list[Segment]] = {}
        folds: dict[int, list[Segment]] = {}
        loras: dict[int, list[Segment]] = {}
        start = 0
        for adapter, num_tokens in rows:
            if adapter is not None and adapter.spec.rank > 0 and num_tokens > 0:
                spec = adapter.spec
                segment = Segment(adapter.slot.unit, start, num_tokens)
                if spec.family == "core":
                    assert spec.basis_id is not None
                    cores.setdefault((spec.rank, spec.basis_id), []).append(segment)
                elif spec.family == "fold":
                    folds.setdefault(spec.rank, []).append(segment)
                else:
                    loras.setdefault(spec.rank, []).append(segment)
            start += num_tokens
        parts: list[StepPart] = [
            CorePart(segments, rank, self._bases[basis_id], self.shape, self._records)
            for (rank, basis_id), segments in cores.items()
        ]
        if folds:
            parts.append(FoldPart(folds, self.shape, self._records))
        parts.extend(
            LoraPart(segments, rank, self.shape, self._records) for rank, segments in loras.items()
        )
        return StepAdapters(parts, start) if parts else None
