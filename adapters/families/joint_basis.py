"""``JointBasis``: the bases whose adapters cost no launch, side by side in 64 columns.

A base weight is widened by rows of ``A = BᵀW``, so that its GEMM also returns ``h`` (see
``widened_rows`` for their order), and the kernel behind the GEMM reads ``B`` from here. Owns the
columns and which basis has which; the base weights are somebody else's, who is told of new columns.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.adapters.basis import Basis
from shoal.adapters.spec import GROUPS, BaseShape, Group, Target

COLUMNS = 64
# The canonical basis is nested: its leading columns serve every adapter up to this rank.
CANONICAL_COLUMNS = 32
# Columns come in blocks of this; those of one block and module lie together in ``h``.
BLOCK = 16
# Rows of a weight in float32 at a time: 32 MB for 4096 inputs.
CHUNK_ROWS = 2048


class Columns(NamedTuple):
    """Adjacent columns of the joint basis; both numbers are multiples of ``BLOCK``."""

    first: int
    size: int


Widen = Callable[[Columns], None]


class JointBasis:
    """``B`` of up to three bases for every layer and group, in the dtype of the model.

    ``add`` may be called from any thread while steps run. New columns are written on a stream of
    their own, which is waited for before ``add`` returns: a step planned afterwards finds them, and
    a step under way multiplies them by exact zeros, whatever they hold.

    Memory: ``64·layers·Σn_group`` elements; 176 MB for Llama-3.1-8B in 16 bits.
    """

    def __init__(self, shape: BaseShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self._device = device
        self._lock = threading.Lock()
        self._places: dict[str, Columns | None] = {}
        self._watchers: list[Widen] = []
        with torch.inference_mode(False):  # else later writes from other threads are refused
            self._rows: dict[tuple[int, Group], Tensor] = {
                (layer, group): torch.zeros(
                    COLUMNS, shape.group_dims(group).d_out, device=device, dtype=dtype
                )
                for layer in range(shape.num_layers)
                for group in GROUPS
            }
        # A stream of its own writes later: what it writes to must be there by then.
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )

    def place(self, basis_id: str | None) -> Columns | None:
        """The columns of a basis; None when it has none: its adapters need ``core_apply``.

        Once a basis was added the answer never changes.
        """
        return self._places.get(basis_id) if basis_id is not None else None

    def rows_of(self, layer: int, group: Group) -> Tensor:
        """``Bᵀ``: ``(64, n_group)``, modules side by side; always the same tensor."""
        return self._rows[layer, group]

    def add(self, basis: Basis) -> Columns | None:
        """Give a basis its columns, write them, and have the base weights widened.

        The first canonical basis takes columns 0 to 31 (its own first 32). Any other takes free
        blocks behind them when all of it fits; first come, first served, and nothing ever leaves.

        Raises: what the watchers raise; the columns are free again then.
        """
        with self._lock:
            if basis.id in self._places:
                return self._places[basis.id]
            columns = self._choose(basis)
            if columns is not None:
                with self._written():
                    self._write(basis, columns)
                    for widen in self._watchers:
                        widen(columns)
            self._places[basis.id] = columns
            return columns

    def watch(self, widen: Widen) -> None:
        """Have ``widen`` called with every run of columns: those in use now, and each new one.

        It writes the rows that ``widened_rows`` returns behind the base weights, on the current
        stream (a side stream on CUDA), and runs on whichever thread adds a basis.
        """
        with self._lock:
            with self._written():
                for columns in self._places.values():
                    if columns is not None:
                        widen(columns)
            self._watchers.append(widen)

    @torch.no_grad()
    def widened_rows(
        self, layer: int, group: Group, weight: Tensor, columns: Columns | None = None
    ) -> Tensor:
        """``A = BᵀW`` of some columns, in the order in which they lie behind the base's rows.

        That order is by block of 16 columns, then module: the rows of ``columns`` start
        ``modules·first`` rows behind the weight's own, and column ``j`` of module ``m`` is row
        ``(j // 16)·modules·16 + m·16 + j % 16``.

        Args:
            weight: ``(n_group, d_in)``, the base's, modules one below the other.
            columns: which ones; default all 64.

        Returns:
            ``(modules · size, d_in)`` in the weight's dtype; sums are float32.
        """
        first, size = columns or Columns(0, COLUMNS)
        basis = self._rows[layer, group][first : first + size]
        modules = GROUPS[group]
        d_in = weight.shape[1]
        blocks = weight.new_empty(size // BLOCK, len(modules), BLOCK, d_in)
        start = 0
        for i, module in enumerate(modules):
            end = start + self.shape.dims[module].d_out
            sums = weight.new_zeros(size, d_in, dtype=torch.float32)
            for row in range(start, end, CHUNK_ROWS):
                part = slice(row, min(row + CHUNK_ROWS, end))
                sums.addmm_(basis[:, part].float(), weight[part].float())
            blocks[:, i] = sums.view(-1, BLOCK, d_in)
            start = end
        return blocks.view(-1, d_in)

    def _choose(self, basis: Basis) -> Columns | None:
        taken = [columns for columns in self._places.values() if columns is not None]
        if basis.kind == "canonical" and all(columns.first for columns in taken):
            return Columns(0, CANONICAL_COLUMNS)
        count = -(-basis.rank // BLOCK) * BLOCK
        first = max((c.first + c.size for c in taken), default=0)
        first = max(first, CANONICAL_COLUMNS)
        return Columns(first, count) if first + count <= COLUMNS else None

    def _write(self, basis: Basis, columns: Columns) -> None:
        for layer in range(self.shape.num_layers):
            for group, modules in GROUPS.items():
                rows = self._rows[layer, group][columns.first : columns.first + columns.size]
                rows.zero_()  # an attempt that failed may have left something
                start = 0
                for module in modules:
                    width = self.shape.dims[module].d_out
                    factor = basis.factors.get(Target(layer, module))
                    if factor is not None:
                        used = factor.to(self._device).T[: columns.size]
                        rows[: len(used), start : start + width].copy_(used)
                    start += width

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Work on a stream of its own, waited for at the end; on a CPU nothing of the kind."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
