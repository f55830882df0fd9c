"""The device bank: every resident adapter in one flat tensor, and their use in a mixed step.

``AdapterBank`` owns the arena and the bases on the device. It does not decide what is resident
(``slots.py`` does) nor what a family computes (``families/`` does). ``StepAdapters`` belongs to one
step: which tokens use which records, worked out once and applied after every fused GEMM, in plain
torch. That is how a CPU serves, and the reference for CUDA, where ``tables.py`` takes its place.
"""

import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shoal.adapters.basis import Basis
from shoal.adapters.errors import AdapterTooLarge
from shoal.adapters.families.core import CoreBasis, CorePart
from shoal.adapters.families.fold import FoldPart
from shoal.adapters.families.joint_basis import Columns, JointBasis
from shoal.adapters.families.lora import LoraPart
from shoal.adapters.families.scale import ScalePart
from shoal.adapters.families.spectral import DeviceFactors, SpectralPart, factors_elements
from shoal.adapters.families.tiles import Records, Segment
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.spec import UNIT_ELEMENTS, BaseShape, Group, RowAdapter, SectionKind, Target
from shoal.adapters.spectral_basis import SpectralBasis

# What a step uses: by kind of section and basis, then by rank, the segments in token order. One
# token may be in several.
_Used = dict[tuple[SectionKind, str | None], dict[int, list[Segment]]]


class _Load(NamedTuple):
    """A copy into the arena that may still be under way."""

    unit: int
    done: torch.cuda.Event
    source: Tensor


class StepPart(Protocol):
    """The tokens of a step that one kind of section treats alike."""

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

    ``load``, ``wait_loads`` and ``step`` belong to the engine thread; ``add_basis``, ``has_basis``,
    ``add_spectral`` and ``check_spectral`` may be called from any thread.

    Attributes:
        joint: the bases that have columns behind the base weights; None on a CPU unless asked for.
    """

    def __init__(
        self,
        shape: BaseShape,
        *,
        capacity_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
        joint: bool | None = None,
        spectral_bytes: int | None = None,
    ) -> None:
        """Allocate the arena.

        Args:
            capacity_bytes: for the arena; bases come on top.
            dtype: of the arena, float32 on a CPU and the model's on CUDA.
            joint: whether to keep a joint basis, for ``StepTables``; by default on CUDA.
            spectral_bytes: limit for the singular vectors of ``add_spectral``; by default none.
        """
        unit_bytes = UNIT_ELEMENTS * dtype.itemsize
        self.num_units = capacity_bytes // unit_bytes
        if self.num_units < 1:
            raise ValueError(f"capacity_bytes is {capacity_bytes}, must be >= {unit_bytes}")
        self.shape = shape
        self.device = torch.device(device)
        self.dtype = dtype
        on_cuda = self.device.type == "cuda"
        wanted = on_cuda if joint is None else joint
        self.joint = JointBasis(shape, self.device, dtype) if wanted else None
        # Not cleared: what no record has been loaded into is never read.
        arena = torch.empty(self.num_units * UNIT_ELEMENTS, device=self.device, dtype=dtype)
        self._records = Records(arena, UNIT_ELEMENTS)
        self._bases: dict[str, CoreBasis] = {}
        self._bases_lock = threading.Lock()
        self._singular = DeviceFactors(self.device, dtype)
        self._spectral_left = spectral_bytes
        self._load_stream = torch.cuda.Stream(self.device) if on_cuda else None  # type: ignore[no-untyped-call]
        self._loads: deque[_Load] = deque()  # under way, oldest first
        self._last_rows: list[tuple[RowAdapter | None, int]] | None = None
        self._last_step: StepAdapters | None = None

    @property
    def arena(self) -> Tensor:
        """All units, ``(num_units * UNIT_ELEMENTS,)``, for whoever fills it other than by ``load``.

        Such a caller keeps away from it while a step that reads it is under way, and synchronises
        before the next ``load``, which does not wait for other streams.
        """
        return self._records.arena

    def add_basis(self, basis: Basis) -> None:
        """Bring a basis to the device; nothing happens when it is there already.

        When this returns, everything it writes has been written: a step that is planned after that
        may use the basis.
        """
        if basis.id in self._bases:
            return  # without the lock: every request asks, also while another basis is written
        with self._bases_lock:
            if basis.id not in self._bases:
                # Also of a basis with columns of the joint one: adapters of higher rank need it.
                kept = CoreBasis(
                    basis.factors,
                    basis.rank,
                    self.shape,
                    self.device,
                    self.dtype,
                    # What plain torch is faster with; the tables' kernels take the other order.
                    rank_major=self.joint is None and self.device.type == "cpu",
                )
                if self.joint is not None:
                    self.joint.add(basis)
                if self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
                self._bases[basis.id] = kept

    def has_basis(self, basis_id: str) -> bool:
        """Whether ``core`` adapters on this basis can be applied."""
        return basis_id in self._bases

    def core_basis(self, basis_id: str) -> CoreBasis:
        """An added basis."""
        return self._bases[basis_id]

    def add_spectral(self, basis: SpectralBasis, targets: Collection[Target]) -> None:
        """Bring the singular vectors of these targets to the device; those that are there stay.

        When this returns, everything it writes has been written, as with ``add_basis``.

        Raises:
            AdapterTooLarge: they exceed what is left of ``spectral_bytes``. Nothing was added.
            OSError: see ``SpectralBasis.factors``. Nothing was added.
        """
        if all(target in self._singular for target in targets):
            return
        with self._bases_lock:
            missing, size = self._missing(targets)
            made = {t: self._singular.copied(basis.factors(t)) for t in missing}
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            # Last: whoever finds them there, without the lock, may use them at once.
            self._singular.keep(made)
            if self._spectral_left is not None:
                self._spectral_left -= size

    def check_spectral(self, targets: Collection[Target]) -> None:
        """AdapterTooLarge when there is no room for the singular vectors of these targets."""
        with self._bases_lock:
            self._missing(targets)

    def _missing(self, targets: Collection[Target]) -> tuple[list[Target], int]:
        """Which of the targets have no singular vectors here yet, and the bytes of those."""
        missing = [target for target in targets if target not in self._singular]
        elements = sum(factors_elements(self.shape, target) for target in missing)
        size = elements * self.dtype.itemsize
        if self._spectral_left is not None and size > self._spectral_left:
            raise AdapterTooLarge(
                f"the singular vectors of {len(missing)} modules take {size} bytes; "
                f"{self._spectral_left} are left of what this server has for them "
                "(--spectral-memory)"
            )
        return missing, size

    def spectral_part(self, segments: Mapping[int, Sequence[Segment]]) -> SpectralPart:
        """What applies ``spectral`` sections; ``segments`` by rank, in token order."""
        return SpectralPart(segments, self._singular, self.shape, self._records)

    def place(self, basis_id: str) -> Columns | None:
        """The columns of the joint basis that an added basis has, if any."""
        assert basis_id in self._bases, f"basis {basis_id} has not been added"
        return None if self.joint is None else self.joint.place(basis_id)

    def load(self, adapter: RowAdapter, packed: PackedAdapter) -> None:
        """Copy a record into its slot: one contiguous copy.

        On CUDA it runs on a stream of its own, beside the step under way, and this returns at once
        when the record is in page-locked memory; ``wait_loads`` orders it before the steps that
        need it. The slot must not be read by a step under way: the scheduler releases a slot only
        when the last step that uses it has ended.
        """
        assert packed.spec == adapter.spec
        assert packed.data.dtype == self.dtype
        elements = packed.data.numel()
        slot = adapter.slot
        assert elements <= slot.num_units * UNIT_ELEMENTS
        assert slot.unit + slot.num_units <= self.num_units
        self._last_rows = None  # the last step may have read the slot
        extent = self._records.arena.narrow(0, slot.unit * UNIT_ELEMENTS, elements)
        if self._load_stream is None:
            extent.copy_(packed.data)
            return
        with torch.cuda.stream(self._load_stream):
            extent.copy_(packed.data, non_blocking=True)
        # The source is kept until it has been read, whatever the host tier does meanwhile.
        self._loads.append(_Load(slot.unit, self._load_stream.record_event(), packed.data))

    def wait_loads(self, rows: Sequence[tuple[RowAdapter | None, int]] | None = None) -> None:
        """Have the current stream wait for loads under way; the host does not wait.

        Args:
            rows: those of the step to come: it waits only for what they use. Default: for all.
        """
        while self._loads and self._loads[0].done.query():  # type: ignore[no-untyped-call]
            self._loads.popleft()
        if not self._loads:
            return
        used = None if rows is None else {a.slot.unit for a, _ in rows if a is not None}
        for load in self._loads:
            if used is None or load.unit in used:
                torch.cuda.current_stream(self.device).wait_event(load.done)

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
        self.wait_loads(rows)
        if rows != self._last_rows:
            self._last_step = self._build(rows)
            self._last_rows = rows
        return self._last_step

    def _build(self, rows: Sequence[tuple[RowAdapter | None, int]]) -> StepAdapters | None:
        """``step`` without the memory of the last one."""
        used: _Used = {}
        start = 0
        for adapter, num_tokens in rows:
            if adapter is not None and num_tokens:
                for section in adapter.spec.sections:
                    if section.rank or section.kind == "scale":
                        segment = Segment(adapter.slot.unit + section.unit, start, num_tokens)
                        by_rank = used.setdefault((section.kind, section.basis_id), {})
                        by_rank.setdefault(section.rank, []).append(segment)
            start += num_tokens
        return StepAdapters(self._parts(used), start) if used else None

    def _parts(self, used: _Used) -> list[StepPart]:
        """What applies the sections, in an order that suits every adapter.

        First whatever reads ``y0`` from ``y``, or replaces it; behind it, in any order, what adds
        to it.
        """
        shape, records = self.shape, self._records
        parts: list[StepPart] = [
            CorePart(segments, rank, self._bases[basis_id], shape, records)
            for (kind, basis_id), by_rank in used.items()
            if kind == "core" and basis_id is not None
            for rank, segments in by_rank.items()
        ]
        scales = used.get(("scale", None), {})
        parts += [ScalePart(segments, shape, records) for segments in scales.values()]
        folds = used.get(("fold", None))
        if folds:
            parts.append(FoldPart(folds, shape, records))
        loras = used.get(("lora", None), {})
        parts += [LoraPart(segments, rank, shape, records) for rank, segments in loras.items()]
        # There is one basis: that of the base.
        parts += [
            self.spectral_part(by_rank) for (kind, _), by_rank in used.items() if kind == "spectral"
        ]
        return parts
