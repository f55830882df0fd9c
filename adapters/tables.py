"""``StepTables``: which token of a step uses which adapter, as tables on the device.

``fill`` writes them before a step, in one small asynchronous copy; ``parts`` gives what reads them.
Nothing that is launched depends on what the tables hold, only on the key that ``fill`` returns
(``ActiveFamilies``) and on the number of tokens: a step captured in a graph for one key can be
replayed for any mix of adapters with that key. It owns the layout of the tables; what families
compute is in ``families/kernel_parts.py``, and which basis has which columns in
``families/joint_basis.py``.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from shoal.adapters.bank import AdapterBank
from shoal.adapters.families.joint_basis import Columns
from shoal.adapters.families.kernel_parts import (
    TablePart,
    TablesCore,
    TablesFold,
    TablesLora,
    TablesScale,
    TablesSpectral,
)
from shoal.adapters.families.spectral import SpectralPart
from shoal.adapters.families.tiles import Segment
from shoal.adapters.spec import UNIT_ELEMENTS, Group, RowAdapter, SectionKind
from shoal.kernels.core_apply.epilogue import CoreRows
from shoal.kernels.grouped_matmul.kernel import TileTable
from shoal.kernels.grouped_matmul.tiles import make_tiles, most_tiles
from shoal.kernels.launching import power_of_two

# Bases without columns that one step may use. The library keeps fewer: the canonical one, four of
# uploads, three of corrections; and canonical ones of other ranks that adapters were stored with.
WIDE_BASES_MAX = 16
# Staging buffers: one is filled while the copies of earlier steps may still be under way.
STAGING = 3
# Start of every table in bytes: what the widest load wants.
TABLE_ALIGNMENT = 16

# What each part made of a GEMM's input.
Made = tuple[Tensor | None, ...]
Rows = Sequence[tuple[RowAdapter | None, int]]


@dataclass(frozen=True, slots=True)
class ActiveFamilies:
    """What a step has to launch for its adapters: with the number of tokens, the key of a graph.

    Falsy when no row has an adapter.

    Attributes:
        core_columns: 0, 16, 32 or 64: columns of the joint basis that its fused adapters need.
        core_alignment: 8 when every ``core`` rank is a multiple of 8 (R loads 16 bytes at a time),
            else 1; 0 without ``core`` adapters.
        wide_bases: bases, sorted, whose adapters go through ``core_apply``: they have no columns,
            or the adapters' ranks exceed them.
        wide_rank: 0, or a power of two of at least 16 that no rank on those bases exceeds.
        fold_rank, lora_rank: the same of those families.
        scale: whether some adapter has row scales.
        spectral: whether some adapter is spectral.
    """

    core_columns: int = 0
    core_alignment: int = 0
    wide_bases: tuple[str, ...] = ()
    wide_rank: int = 0
    fold_rank: int = 0
    lora_rank: int = 0
    scale: bool = False
    spectral: bool = False

    def __bool__(self) -> bool:
        return self != _NOTHING

    @property
    def capturable(self) -> bool:
        """Whether a step with this key can be captured in a graph and replayed with other rows.

        Spectral adapters are applied by the torch part of the bank, which is made for one step's
        rows: their matrices differ in size too much for a grid that does not look at them.
        """
        return not self.spectral


_NOTHING = ActiveFamilies()


class StepParts:
    """The adapters of a step, as the forward pass applies them.

    Attributes:
        core: adapters on the joint basis, for the kernels behind the GEMMs; None when there are
            none.
        has_others: whether ``before`` and ``apply`` do anything.
    """

    def __init__(self, core: CoreRows | None, others: Sequence[TablePart], tokens: int) -> None:
        self.core = core
        self.has_others = bool(others)
        self._others = tuple(others)
        self._tokens = tokens

    def before(self, layer: int, group: Group, x: Tensor) -> Made:
        """What the adapters need of ``x (tokens, d_in)``, the input of the group's fused GEMM."""
        assert x.shape[0] == self._tokens
        return tuple(part.before(layer, group, x) for part in self._others)

    def apply(self, layer: int, group: Group, made: Made, y: Tensor, *, early: bool) -> None:
        """Apply to ``y`` in place every section of every adapter that is not in ``core``.

        Args:
            made: what ``before`` returned.
            y: ``(tokens, n_group)``, the GEMM's bias-free output ``y0``; rows may be strided. Rows
                without such an adapter keep their bits.
            early: whether the first launch may begin before the GEMM has ended: it is the call
                before, and not on two streams (``launching.overlap_options``).
        """
        assert y.shape[0] == self._tokens
        for part, ready in zip(self._others, made, strict=True):
            part.apply(layer, group, ready, y, early=early)


class StepTables:
    """The tables of one device. Belongs to the engine thread.

    A table is filled for, and read by, steps of one number of tokens: a graph of a row bucket is
    captured over ``parts(active, bucket)`` and replayed after ``fill(rows, bucket)``. Everything is
    ordered by the stream that is current when ``fill`` is called, which must be the step's.
    """

    def __init__(self, bank: AdapterBank, max_tokens: int) -> None:
        """Allocate for steps of up to ``max_tokens`` tokens: 0.4 KB a token, on the device once and
        in page-locked memory ``STAGING`` times."""
        self._bank = bank
        self._max_tokens = max_tokens
        everything = ActiveFamilies(16, 8, ("",) * WIDE_BASES_MAX, 16, 16, 16, True)
        size = _Layout(everything, max_tokens).size
        with torch.inference_mode(False):
            self._tables = torch.zeros(size, dtype=torch.uint8, device=bank.device)
        on_cuda = bank.device.type == "cuda"
        self._staging = deque(_Staging(size, on_cuda) for _ in range(STAGING))
        self._last: tuple[list[tuple[RowAdapter | None, int]], int] | None = None
        self._last_active = ActiveFamilies()
        self._spectral: SpectralPart | None = None

    def fill(self, rows: Rows, tokens: int) -> ActiveFamilies:
        """Say which adapters the next step's tokens use; asynchronous on CUDA, one copy at most.

        Also makes the current stream wait for those copies into the bank that these rows need.
        Nothing is copied when the rows equal the last call's, or when none has an adapter.

        Args:
            rows: each row's adapter (loaded, its basis added) and number of tokens, in the order in
                which the rows' tokens are concatenated.
            tokens: tokens of the step, at least the rows' together; those behind have no adapter.

        Returns:
            The key for ``parts``.
        """
        rows = list(rows)
        self._bank.wait_loads(rows)
        if self._last == (rows, tokens):
            return self._last_active
        plan = _plan(rows, self._bank)
        assert plan.tokens <= tokens <= self._max_tokens
        active = plan.active
        if active:
            layout = _Layout(active, tokens)
            staging = self._staging[0]
            self._staging.rotate(-1)
            staging.wait()
            _write(plan, layout.arrays(staging.bytes))
            staging.send(self._tables, layout.size)
        self._spectral = self._bank.spectral_part(plan.spectral) if plan.spectral else None
        self._last, self._last_active = (rows, tokens), active
        return active

    def nobody(self, active: ActiveFamilies, tokens: int) -> None:
        """Let the tables of this key say that no token has an adapter.

        What ``parts`` of a key that the last ``fill`` did not return would find there else is
        whatever other tables lay there.
        """
        assert active.capturable
        self._last = None
        if not active:
            return
        layout = _Layout(active, tokens)
        staging = self._staging[0]
        self._staging.rotate(-1)
        staging.wait()
        for name, table in layout.arrays(staging.bytes).items():
            table.fill(-1 if name.endswith("addresses") else 0)
        staging.send(self._tables, layout.size)

    def parts(self, active: ActiveFamilies, tokens: int, max_rows: int | None = None) -> StepParts:
        """What applies the adapters of every step that is filled with this key and ``tokens``.

        With a key that is not ``capturable``: only those of the last ``fill``.

        Args:
            max_rows: most rows that such a step has (by default one a token): a prompt step of few
                rows launches fewer programs.
        """
        layout = _Layout(active, tokens)
        shape, arena = self._bank.shape, self._bank.arena
        table = partial(layout.tensor, self._tables)
        core = None
        others: list[TablePart] = []
        if active.core_columns:
            core = CoreRows(
                arena,
                table("core.addresses"),
                table("core.ranks"),
                table("core.firsts"),
                columns=active.core_columns,
                alignment=active.core_alignment,
            )
        # In the order of ``AdapterBank.step``: what is in ``core`` takes h from the GEMM, and an
        # adapter with row scales is not in it, so that one may come last.
        for i, basis_id in enumerate(active.wide_bases):
            others.append(
                TablesCore(
                    table(f"wide{i}.addresses"),
                    table(f"wide{i}.squares"),
                    table(f"wide{i}.ranks"),
                    self._bank.core_basis(basis_id),
                    active.wide_rank,
                    active.core_alignment,
                    shape,
                    arena,
                )
            )
        if active.scale:
            others.append(TablesScale(table("scale.addresses"), shape, arena))
        tiles = most_tiles(tokens, tokens if max_rows is None else max_rows)
        if active.fold_rank:
            used = layout.tiles(self._tables, "fold", tiles)
            others.append(TablesFold(table("fold.tokens"), used, active.fold_rank, shape, arena))
        if active.lora_rank:
            used = layout.tiles(self._tables, "lora", tiles)
            others.append(TablesLora(used, active.lora_rank, shape, arena))
        if active.spectral:
            assert self._spectral is not None
            others.append(TablesSpectral(self._spectral))
        return StepParts(core, others, tokens)


# Per row with such a section: first token, tokens, start of the section in the arena, rank; and, on
# the joint basis, the first column.
Runs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Plan:
    """A step's rows by what has to be launched for them; ``(runs, 4 or 5)`` in token order."""

    tokens: int
    core: Runs
    wide: dict[str, Runs]
    scale: Runs
    fold: Runs
    lora: Runs
    spectral: dict[int, list[Segment]]
    active: ActiveFamilies


def _plan(rows: Rows, bank: AdapterBank) -> _Plan:
    core: list[tuple[int, ...]] = []
    wide: dict[str, list[tuple[int, ...]]] = {}
    # Of the kinds that share nothing.
    others: dict[SectionKind, list[tuple[int, ...]]] = {"scale": [], "fold": [], "lora": []}
    spectral: dict[int, list[Segment]] = {}
    places: dict[str, Columns] = {}
    start = 0
    for adapter, length in rows:
        if adapter is not None and length:
            for kind, rank, unit, basis_id in adapter.spec.sections:
                address = (adapter.slot.unit + unit) * UNIT_ELEMENTS
                if kind == "spectral":
                    segment = Segment(adapter.slot.unit + unit, start, length)
                    spectral.setdefault(rank, []).append(segment)
                elif kind != "core":
                    if rank or kind == "scale":
                        others[kind].append((start, length, address, rank))
                elif rank:
                    assert basis_id is not None
                    place = places.get(basis_id)
                    if place is None:
                        place = places[basis_id] = bank.place(basis_id) or Columns(0, 0)
                    if rank <= place.size:
                        core.append((start, length, address, rank, place.first))
                    else:
                        wide.setdefault(basis_id, []).append((start, length, address, rank))
        start += length
    assert len(wide) <= WIDE_BASES_MAX
    plan = _Plan(
        start,
        _table(core),
        {basis_id: _table(wide[basis_id]) for basis_id in sorted(wide)},
        _table(others["scale"]),
        _table(others["fold"]),
        _table(others["lora"]),
        spectral,
        ActiveFamilies(),
    )
    return replace(plan, active=_active(plan))


def _table(runs: list[tuple[int, ...]]) -> Runs:
    return np.array(runs, dtype=np.int64)


def _active(plan: _Plan) -> ActiveFamilies:
    every = [plan.core, *plan.wide.values()]
    ranks = np.concatenate([runs[:, 3] for runs in every if len(runs)] or [_table([])])
    needed = int((plan.core[:, 3] + plan.core[:, 4]).max()) if len(plan.core) else 0
    return ActiveFamilies(
        core_columns=power_of_two(needed, least=16) if needed else 0,
        core_alignment=(1 if (ranks % 8).any() else 8) if len(ranks) else 0,
        wide_bases=tuple(plan.wide),
        wide_rank=max(map(_rank_class, plan.wide.values()), default=0),
        fold_rank=_rank_class(plan.fold),
        lora_rank=_rank_class(plan.lora),
        scale=len(plan.scale) > 0,
        spectral=bool(plan.spectral),
    )


def _rank_class(runs: Runs) -> int:
    return power_of_two(int(runs[:, 3].max()), least=16) if len(runs) else 0


_TILES: tuple[tuple[str, DTypeLike], ...] = (
    ("starts", np.int32),
    ("lengths", np.int32),
    ("addresses", np.int64),
    ("ranks", np.int32),
)
_TORCH_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


class _Layout:
    """Where the tables of a step lie: only those that its families need, from the front.

    Every table has one entry a token; of tiles there are never more.
    """

    def __init__(self, active: ActiveFamilies, tokens: int) -> None:
        tables: list[tuple[str, DTypeLike]] = []
        if active.core_columns:
            tables += [("core.addresses", np.int64), ("core.ranks", np.int32)]
            tables += [("core.firsts", np.int32)]
        if active.scale:
            tables += [("scale.addresses", np.int64)]
        if active.fold_rank:
            tables += [("fold.tokens", np.int32)]
            tables += [(f"fold.{name}", dtype) for name, dtype in _TILES]
        if active.lora_rank:
            tables += [(f"lora.{name}", dtype) for name, dtype in _TILES]
        for i in range(len(active.wide_bases)):
            tables += [(f"wide{i}.addresses", np.int64), (f"wide{i}.squares", np.int64)]
            tables += [(f"wide{i}.ranks", np.int32)]
        self._places: dict[str, tuple[slice, np.dtype[np.generic]]] = {}
        end = 0
        for name, type_ in tables:
            dtype: np.dtype[np.generic] = np.dtype(type_)
            start = -(-end // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
            end = start + tokens * dtype.itemsize
            self._places[name] = (slice(start, end), dtype)
        self.size = end

    def arrays(self, buffer: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The tables in host memory."""
        return {name: buffer[place].view(dtype) for name, (place, dtype) in self._places.items()}

    def tensor(self, buffer: Tensor, name: str) -> Tensor:
        """One table on the device."""
        place, dtype = self._places[name]
        return buffer[place].view(_TORCH_DTYPES[dtype])

    def tiles(self, buffer: Tensor, family: str, count: int) -> TileTable:
        """The first ``count`` tiles of a family."""
        return TileTable(*(self.tensor(buffer, f"{family}.{name}")[:count] for name, _ in _TILES))


def _write(plan: _Plan, tables: dict[str, NDArray[Any]]) -> None:
    """Fill the tables, in host memory, with what ``plan`` says."""
    if len(plan.core):
        _write_tokens(plan.core, tables, "core", addresses=2, ranks=3, firsts=4)
    if len(plan.scale):
        _write_tokens(plan.scale, tables, "scale", addresses=2)
    if len(plan.fold):
        _write_tokens(plan.fold, tables, "fold", tokens=3)
        _write_tiles(plan.fold, tables, "fold")
    if len(plan.lora):
        _write_tiles(plan.lora, tables, "lora")
    for i, runs in enumerate(plan.wide.values()):
        _write_tokens(runs, tables, f"wide{i}", addresses=2, ranks=3)
        ranks = tables[f"wide{i}.ranks"]
        tables[f"wide{i}.squares"][:] = ranks.astype(np.int64) ** 2


def _write_tokens(runs: Runs, tables: dict[str, NDArray[Any]], family: str, **columns: int) -> None:
    """Write, for each token, the named columns of its run; elsewhere -1 as address, else 0."""
    tokens, lengths = runs[:, 0], runs[:, 1]
    if lengths.max() > 1:
        owners = np.repeat(np.arange(len(runs)), lengths)
        inside = np.arange(len(owners)) - (np.cumsum(lengths) - lengths)[owners]
        runs = runs[owners]
        tokens = runs[:, 0] + inside
    for name, column in columns.items():
        table = tables[f"{family}.{name}"]
        table.fill(-1 if name == "addresses" else 0)
        table[tokens] = runs[:, column]


def _write_tiles(runs: Runs, tables: dict[str, NDArray[Any]], family: str) -> None:
    starts, lengths, addresses, ranks = runs.T
    joined = (addresses[1:] == addresses[:-1]) & (starts[1:] == starts[:-1] + lengths[:-1])
    if joined.any() or lengths.max() > 1:
        plan = make_tiles(map(tuple, runs.tolist()))
        tiles: tuple[Any, ...] = (plan.starts, plan.lengths, plan.addresses, plan.ranks)
    else:
        tiles = (starts, lengths, addresses, ranks)  # every run is a tile: most decode steps
    for (name, _), values in zip(_TILES, tiles, strict=True):
        tables[f"{family}.{name}"][: len(values)] = values
    tables[f"{family}.lengths"][len(tiles[0]) :] = 0


class _Staging:
    """Host memory that a copy to the device may still be reading."""

    def __init__(self, size: int, on_cuda: bool) -> None:
        with torch.inference_mode(False):
            self._tensor = torch.zeros(size, dtype=torch.uint8, pin_memory=on_cuda)
        self.bytes: NDArray[np.uint8] = self._tensor.numpy()
        self._sent = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until it may be written: at once, unless ``STAGING`` fills are under way."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, target: Tensor, size: int) -> None:
        """Copy the first bytes, on the current stream."""
        target[:size].copy_(self._tensor[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
