"""``core``: LoRA-XS adapters, one small ``R`` per target between the two frozen factors of a basis.

``delta = s·(h Rᵀ) Bᵀ`` with ``h = y0 B``, where ``y0`` is the bias-free base output (exact because
the basis has ``A = BᵀW``). Only ``R`` belongs to the adapter; ``B`` is shared by all on a basis.

A base correction (PiSSA, MiLoRA, OLoRA) is one too, with ``R = -I``: see ``of_correction``.

A record holds ``[layer][module in MODULES order][r, r]`` of ``s·R``, zero where a target is absent
and zero-padded where its own rank is smaller (bases are nested, so padding changes nothing).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.adapters.families.tiles import (
    Records,
    Segment,
    Tiling,
    Tokens,
    apply_tiles,
    gather_whole,
)
from shoal.adapters.spec import GROUPS, MODULES, BaseShape, Group, Target
from shoal.adapters.weights import AdapterWeights, Correction, Terms

# Of a basis that an upload brings; adapters on larger ones are served as ``lora``. A basis takes
# device memory at its rank for every layer and module, and that has to be set aside at start.
RANK_MAX = 128
# Rows of a weight in float64 at a time, as the device may be full: 59 MB for 14336 inputs.
CHUNK_ROWS = 512


def packed_elements(shape: BaseShape, rank: int) -> int:
    """Elements of one record."""
    return shape.num_layers * len(MODULES) * rank * rank


def record_offset(shape: BaseShape, rank: int, layer: int, module: str) -> int:
    """Where the ``(r, r)`` of one target starts inside a record, in elements."""
    return (layer * len(MODULES) + MODULES.index(module)) * rank * rank


def summed(terms: Terms) -> dict[Target, Tensor]:
    """``Σ factor·s·R`` per target: ``(r, r)`` float64 of the largest rank, smaller ones padded."""
    sums: dict[Target, Tensor] = {}
    for weights, factor in terms:
        for target, (r_matrix,) in weights.tensors.items():
            added = r_matrix.to(torch.float64) * (weights.scales[target] * factor)
            known = sums.get(target)
            if known is not None:
                rank = max(known.shape[0], added.shape[0])
                added = _padded(added, rank) + _padded(known, rank)
            sums[target] = added
    return sums


def factors(r_matrix: Tensor, basis: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What it is as ``lora``: ``A = R BᵀW`` in float64, and the leading columns of ``B``.

    Args:
        r_matrix: ``(r, r)``.
        basis: ``B (d_out, r or more)``.
        weight: ``(d_out, d_in)``; the product is made on its device.
    """
    b = basis[:, : r_matrix.shape[0]].contiguous()
    wide = b.to(weight.device, torch.float64)
    frozen = wide.new_zeros(b.shape[1], weight.shape[1])
    for row in range(0, weight.shape[0], CHUNK_ROWS):
        part = slice(row, row + CHUNK_ROWS)
        frozen.addmm_(wide[part].T, weight[part].detach().to(torch.float64))
    return r_matrix.to(torch.float64) @ frozen.cpu(), b


def pack(terms: Terms, shape: BaseShape, out: Tensor) -> None:
    """Fill ``out`` (1-D, ``packed_elements`` long, the bank's dtype) with a sum on one basis."""
    rank = max(weights.rank for weights, _ in terms)
    out.zero_()
    table = out.view(shape.num_layers, len(MODULES), rank, rank)
    for target, r_matrix in summed(terms).items():
        own = r_matrix.shape[0]
        table[target.layer, MODULES.index(target.module), :own, :own] = r_matrix.to(out.dtype)


def _padded(matrix: Tensor, rank: int) -> Tensor:
    more = rank - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, more, 0, more))


def of_correction(correction: Correction) -> AdapterWeights:
    """The ``core`` adapter that a base correction is: ``R = -I``, so ``-s·(y0 B) Bᵀ``."""
    turned = -torch.eye(max(correction.ranks.values()))
    return AdapterWeights(
        format=correction.method,
        family="core",
        tensors={target: (turned[:rank, :rank],) for target, rank in correction.ranks.items()},
        scales=correction.scales,
        basis_id=correction.basis_id,
    )


def reference(
    weights: AdapterWeights,
    shape: BaseShape,
    layer: int,
    group: Group,
    x: Tensor,
    y0: Tensor,
    factors: Mapping[Target, Tensor],
) -> Tensor:
    """What one adapter adds to ``y0 (tokens, n_group)``, module by module, in ``y0``'s dtype."""
    delta = torch.zeros_like(y0)
    start = 0
    for module in GROUPS[group]:
        columns = slice(start, start + shape.dims[module].d_out)
        start = columns.stop
        target = Target(layer, module)
        if target in weights.tensors:
            r_matrix = weights.tensors[target][0].to(y0.dtype)
            basis = factors[target].to(y0.dtype)[:, : r_matrix.shape[0]]
            h = y0[:, columns] @ basis
            delta[:, columns] = weights.scales[target] * (h @ r_matrix.T) @ basis.T
    return delta


class CoreBasis:
    """One basis on the device, per module and layer; modules it does not cover take no memory.

    Kept ``(rank, d_out)`` (``rank_major``, where a smaller rank is one contiguous prefix: the torch
    parts) or ``(d_out, rank)`` (what the kernels take).
    """

    def __init__(
        self,
        factors: Mapping[Target, Tensor],
        rank: int,
        shape: BaseShape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rank_major: bool,
    ) -> None:
        self.rank = rank
        self.rank_major = rank_major
        self._kept: dict[str, tuple[Tensor, ...]] = {}
        for module in {target.module for target in factors}:
            d_out = shape.dims[module].d_out
            sizes = (rank, d_out) if rank_major else (d_out, rank)
            # Converted and put in order there: on a GPU in no time, seconds on its host.
            stacked = torch.zeros(shape.num_layers, *sizes, device=device, dtype=dtype)
            for layer, kept in enumerate(stacked):
                factor = factors.get(Target(layer, module))
                if factor is not None:
                    columns = kept.T if rank_major else kept
                    columns[:, : factor.shape[1]].copy_(factor.to(device))
            self._kept[module] = stacked.unbind(0)

    def rows(self, layer: int, module: str, rank: int) -> Tensor | None:
        """``Bᵀ[:rank]`` of a target, ``(rank, d_out)``, a view; None outside the basis."""
        kept = self._kept.get(module)
        if kept is None:
            return None
        matrix = kept[layer]
        return matrix[:rank] if self.rank_major else matrix[:, :rank].T


class CorePart:
    """The tokens of a step whose adapters are ``core`` of one rank on one basis."""

    def __init__(
        self,
        segments: Sequence[Segment],
        rank: int,
        basis: CoreBasis,
        shape: BaseShape,
        records: Records,
    ) -> None:
        assert rank <= basis.rank, f"core adapter of rank {rank} on a basis of {basis.rank}"
        self.rank = rank
        self.basis = basis
        self.shape = shape
        self.records = records
        device = records.arena.device
        self.tokens, self.inside = Tokens.covering(segments, device)
        self.tiling = Tiling.of(segments, device)
        self._whole: list[Tensor] | None = None
        self._gathered = False

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add the deltas to ``y``, which holds ``y0``: each module reads and writes its columns."""
        rank = self.rank
        if not self._gathered:  # on first use: by then everything has been loaded
            elements = packed_elements(self.shape, rank)
            self._whole = gather_whole(self.tiling, self.records, elements)
            self._gathered = True
        part = self.tokens.take(y, self.records.arena.dtype)
        start = 0
        for module in GROUPS[group]:
            width = self.shape.dims[module].d_out
            columns = part.narrow(1, start, width)
            start += width
            basis = self.basis.rows(layer, module, rank)
            if basis is None:
                continue
            offset = record_offset(self.shape, rank, layer, module)
            # (Bᵀ yᵀ)ᵀ rather than y B: half the time on a CPU (64 tokens, rank 8, MKL).
            projected = basis @ columns.T
            if self.inside is not None:
                projected = projected.index_select(1, self.inside)
            h = projected.T.contiguous()
            turned = apply_tiles(
                self.tiling, self.records, h, offset, rank * rank, _turn, self._whole
            )
            if self.inside is not None:  # the others in the range get exactly zero added
                spread = turned.new_zeros(part.shape[0], rank)
                turned = spread.index_copy_(0, self.inside, turned)
            columns.addmm_(turned, basis)
        self.tokens.put(y, part)


def _turn(h: Tensor, data: Tensor) -> Tensor:
    """``h Rᵀ`` per tile: ``(tiles, size, r)`` with ``(tiles, r*r)``."""
    rank = h.shape[-1]
    return torch.bmm(h, data.view(-1, rank, rank).transpose(1, 2))
