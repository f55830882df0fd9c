"""Bases: the frozen orthonormal factors ``B`` that LoRA-XS adapters share.

Owns what a basis is, how the canonical one is computed, its file, its probes, and the durable set
of known bases. It does not decide which basis an upload uses (``formats/lora_xs.py``) nor put one
on a device (``bank.py``).

A basis is one safetensors file; its id is the sha256 of that file. Tensors are
``layers.<layer>.<module>.B`` of shape ``(d_out, k)``, float32, orthonormal columns. Only ``B`` is
kept: ``A = BᵀW`` exactly, so ``x Aᵀ = (x Wᵀ) B``.
"""

import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.container import read_tensors, tensor_chunks, write_atomically
from shoal.adapters.spec import MODULES, BaseShape, Target
from shoal.adapters.weights import CORRECTION_METHODS, WeightOf

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
MapInOrder = Callable[[Callable[[Target], Tensor], Iterable[Target]], Iterator[Tensor]]

DEFAULT_RANK = 64
PROBE_COLUMNS = 4
# Each holds a few float64 copies of a weight: 0.4 GB at 4096 x 14336.
COMPUTE_THREADS_MAX = 8
# Allowed ‖BᵀB − I‖_F. The canonical basis is orthonormal to float32 rounding (1e-6 measured at
# rank 64). An uploaded one may have been rounded to 16 bits (bfloat16 at rank 64: 1e-2).
Kind = Literal["canonical", "uploaded", "pissa", "milora", "olora"]
ORTHONORMALITY: Mapping[str | None, float] = {
    "canonical": 1e-4,
    "uploaded": 3e-2,
    **dict.fromkeys(CORRECTION_METHODS, 1e-4),
}

_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.B")


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """A set of factors.

    Attributes:
        id: sha256 (hex) of its file.
        rank: largest number of columns over its targets.
        factors: per target ``B (d_out, k)``, float32 on the CPU. A canonical basis covers every
            target with ``k = min(rank, d_out, d_in)`` and is nested: an adapter of rank ``r`` uses
            the first ``r`` columns. An uploaded one covers the targets of the file it came from.
            Those of ``corrections.py`` are nested too.
        kind: where it comes from: the base, an upload, or the base for the sake of a correction.
        base_digest: the base it was computed for.
        probed: what ``probes`` gives, where ``factors`` are only shapes: see ``sketch``.
    """

    id: str
    rank: int
    factors: Mapping[Target, Tensor]
    kind: Kind
    base_digest: str = ""
    probed: Mapping[Target, Tensor] | None = None


# ---------------------------------------------------------------------------- seeded directions


def seeded_columns(target: Target, rows: int, columns: int, purpose: str) -> Tensor:
    """Fixed pseudo-random columns, ``(rows, columns)`` float64, uniform in (−1, 1).

    They decide signs and probes that are stored in files, so they must never change. They
    therefore come from SHAKE-256, not from a library's generator. Column ``c`` of target ``t``
    reads the stream of ``"shoal:<purpose>:1:<layer>:<module>:<c>"`` as little-endian 32-bit
    integers ``n``, one per row, and holds ``(n + 1/2) / 2^31 − 1``.
    """
    drawn = np.empty((rows, columns))
    for column in range(columns):
        seed = f"shoal:{purpose}:1:{target.layer}:{target.module}:{column}".encode()
        stream = hashlib.shake_256(seed).digest(4 * rows)
        drawn[:, column] = (np.frombuffer(stream, dtype="<u4") + 0.5) / 2.0**31 - 1.0
    return torch.from_numpy(drawn)


def probe(factor: Tensor, target: Target, columns: int = PROBE_COLUMNS) -> Tensor:
    """What identifies a factor in a file that leaves it out: ``BᵀP``.

    Args:
        factor: ``B (d_out, r)``; a leading slice gives the leading rows of the probe.
        target: whose factor it is; every target has its own ``P``.
        columns: columns of ``P (d_out, columns)``.

    Returns:
        ``(r, columns)`` float32. Row ``i`` changes when column ``i`` does, sign included.
    """
    seeded = seeded_columns(target, factor.shape[0], columns, "probe")
    product: Tensor = factor.detach().cpu().double().T @ seeded
    return product.float()


@lru_cache(maxsize=8)
def probes(basis: Basis) -> Mapping[Target, Tensor]:
    """`probe` of each whole factor of a basis; computed once, because every upload is compared."""
    if basis.probed is not None:
        return basis.probed
    return {target: probe(factor, target) for target, factor in basis.factors.items()}


class _Shape(NamedTuple):
    """Stands for a factor where only its shape may be asked for."""

    shape: tuple[int, ...]


def sketch(basis: Basis) -> Basis:
    """What identifies a basis: all but its factors, of which the shapes and probes are left.

    A thousandth of the bytes, for another process to compare compact files with.
    """
    shapes = {target: _Shape(tuple(factor.shape)) for target, factor in basis.factors.items()}
    return replace(basis, factors=cast(Mapping[Target, Tensor], shapes), probed=probes(basis))


# -------------------------------------------------------------------------------- computing one


def compute_basis(
    weight_of: WeightOf, shape: BaseShape, rank: int, progress: Progress | None = None
) -> Basis:
    """The canonical basis: each target's leading left singular vectors, computed in float64.

    Sorted by descending singular value; each column's sign makes its dot product with a seeded
    vector positive. A smaller rank gives the leading columns of a larger one. Two machines agree
    to about 1e-10 where singular values differ by 1 %.

    Args:
        weight_of: the base's weights; the work is done on their device.
        shape: the base.
        rank: columns wanted; fewer where a weight's smaller side is less.
        progress: called with (targets done, targets in all).

    Cost: one symmetric eigendecomposition of each weight's smaller side; SmolLM2-135M takes
    9 s of one core.
    """
    if rank < 1:
        raise ValueError(f"basis rank {rank} must be at least 1")
    targets = shape.targets()
    factors: dict[Target, Tensor] = {}
    on_cpu = weight_of(targets[0]).device.type == "cpu"
    with _one_thread_each(COMPUTE_THREADS_MAX if on_cpu else 1) as map_in_order:
        found = map_in_order(lambda t: leading_left_vectors(weight_of(t), t, rank), targets)
        for target, factor in zip(targets, found, strict=True):
            if progress is not None:
                progress(len(factors), len(targets))
            factors[target] = factor
    if progress is not None:
        progress(len(targets), len(targets))
    return make_basis(factors, kind="canonical", base_digest=shape.digest)


def make_basis(
    factors: Mapping[Target, Tensor],
    *,
    kind: Kind,
    base_digest: str,
) -> Basis:
    """A basis of given factors ``(d_out, k)``, identified by the bytes of its file."""
    kept = {target: factors[target].detach().cpu().float().contiguous() for target in factors}
    rank = max(factor.shape[1] for factor in kept.values())
    digest = hashlib.sha256()
    for chunk in _chunks(kept, rank, kind, base_digest):
        digest.update(chunk)
    return Basis(digest.hexdigest(), rank, kept, kind, base_digest)


@contextlib.contextmanager
def _one_thread_each(workers_max: int) -> Iterator[MapInOrder]:
    """Several targets at a time, one thread each, instead of several threads to a target.

    Matrices of this size gain nothing from threads inside the decomposition: one of 576 x 576 takes
    0.07 s on one thread, and 0.3 s on two when other work uses the cores. Results do not depend on
    the number of threads this way either. While it lasts, torch runs on one thread everywhere.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(min(threads, workers_max), "basis")
    torch.set_num_threads(1)
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@torch.no_grad()
def leading_left_vectors(weight: Tensor, target: Target, rank: int) -> Tensor:
    """See `compute_basis`; ``(d_out, min(rank, d_out, d_in))``, float32, on the CPU."""
    w = weight.detach().to(torch.float64)
    d_out, d_in = w.shape
    k = min(rank, d_out, d_in)
    # eigh sorts ascending, so the last k columns, flipped, belong to the k largest values.
    if d_out <= d_in:
        factor = torch.linalg.eigh(w @ w.T).eigenvectors[:, -k:].flip(1)
    else:
        right = torch.linalg.eigh(w.T @ w).eigenvectors[:, -k:].flip(1)
        # W V = U Σ has orthogonal columns; QR divides by Σ without dividing by a tiny σ.
        factor = torch.linalg.qr(w @ right).Q
    factor = factor.cpu()
    direction = seeded_columns(target, d_out, 1, "sign")[:, 0]
    signs = torch.where(direction @ factor < 0, -1.0, 1.0)
    signed: Tensor = factor * signs
    return signed.float()


# ----------------------------------------------------------------------------------- its file


def save_basis(basis: Basis, path: Path) -> None:
    """Write the basis' file, atomically and durably; its sha256 is ``basis.id``."""
    write_atomically(path, _chunks(basis.factors, basis.rank, basis.kind, basis.base_digest))


def load_basis(path: Path, shape: BaseShape | None = None) -> Basis:
    """Read a basis and check everything that serving relies on.

    Args:
        path: the file.
        shape: the base it must fit; None skips the comparison of shapes.

    Raises:
        AdapterRejected: not a basis file, a shape or dtype that does not fit, a column that is not
            finite or not orthonormal, a canonical basis that lacks targets. Names the tensor.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        tensors, metadata = read_tensors(file, size, path.name)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kind, base_digest = metadata.get("kind"), metadata.get("base_digest")
    if metadata.get("format") != "shoal-basis" or kind not in ORTHONORMALITY or base_digest is None:
        raise AdapterRejected(path.name, "is not a basis file")
    if not tensors:
        raise AdapterRejected(path.name, "holds no factors")
    factors: dict[Target, Tensor] = {}
    for name, factor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in MODULES:
            raise AdapterRejected(name, "must be layers.<layer>.<module>.B")
        target = Target(int(match[1]), match[2])
        _check_factor(name, target, factor, ORTHONORMALITY[kind], shape)
        factors[target] = factor
    rank = max(factor.shape[1] for factor in factors.values())
    if metadata.get("rank") != str(rank):
        raise AdapterRejected(path.name, f"metadata rank must be {rank}")
    ordered = {target: factors[target] for target in sorted(factors, key=_position)}
    basis = Basis(digest, rank, ordered, cast(Kind, kind), base_digest)
    if shape is not None and kind == "canonical":
        _check_canonical(basis, shape, path.name)
    return basis


def _chunks(
    factors: Mapping[Target, Tensor], rank: int, kind: str, base_digest: str
) -> Iterator[bytes | memoryview]:
    metadata = {
        "format": "shoal-basis",
        "version": "1",
        "kind": kind,
        "rank": str(rank),
        "base_digest": base_digest,
    }
    return tensor_chunks({f"{target}.B": factor for target, factor in factors.items()}, metadata)


def _position(target: Target) -> tuple[int, int]:
    return target.layer, MODULES.index(target.module)


def _check_factor(
    name: str, target: Target, factor: Tensor, tolerance: float, shape: BaseShape | None
) -> None:
    if factor.dtype != torch.float32 or factor.ndim != 2 or factor.shape[1] < 1:
        raise AdapterRejected(name, "must be a float32 matrix with at least one column")
    if shape is not None:
        if target.layer >= shape.num_layers:
            raise AdapterRejected(name, f"{shape.name} has layers 0 to {shape.num_layers - 1}")
        dims = shape.dims[target.module]
        if factor.shape[0] != dims.d_out or factor.shape[1] > min(dims):
            raise AdapterRejected(
                name,
                f"shape {list(factor.shape)} must be [{dims.d_out}, at most {min(dims)}]",
            )
    error = orthonormality_error(factor)
    if not error <= tolerance:
        raise AdapterRejected(name, f"‖BᵀB−I‖ is {error:.1e}, must be at most {tolerance:.0e}")


def _check_canonical(basis: Basis, shape: BaseShape, where: str) -> None:
    if basis.base_digest != shape.digest:
        raise AdapterRejected(
            where, f"was computed for base {basis.base_digest}, not for {shape.digest}"
        )
    for target in shape.targets():
        expected = min(basis.rank, *shape.dims[target.module])
        factor = basis.factors.get(target)
        if factor is None or factor.shape[1] != expected:
            raise AdapterRejected(f"{target}.B", f"must be present and have {expected} columns")


def orthonormality_error(factor: Tensor) -> float:
    """``‖BᵀB − I‖_F`` in float64."""
    b = factor.double()
    return float(torch.linalg.norm(b.T @ b - torch.eye(b.shape[1], dtype=b.dtype)))


def canonical_basis(
    weight_of: WeightOf,
    shape: BaseShape,
    rank: int,
    cache_dir: Path,
    progress: Progress | None = None,
) -> Basis:
    """The base's canonical basis from ``cache_dir``, computed and stored there the first time.

    The file is ``basis-<first 16 of the base digest>-r<rank>.safetensors``. One that is damaged or
    belongs to another base is computed again. A place that cannot be written costs time at the
    next start, nothing else.
    """
    path = canonical_path(cache_dir, shape, rank)
    if path.exists():
        try:
            return load_basis(path, shape)
        except AdapterRejected as error:
            log.warning("computing the basis again: %s is unusable: %s", path, error)
    basis = compute_basis(weight_of, shape, rank, progress)
    try:
        save_basis(basis, path)
    except OSError as error:
        log.warning("the basis is not kept for the next start: %s", error)
    return basis


def canonical_path(cache_dir: Path, shape: BaseShape, rank: int) -> Path:
    """Where `canonical_basis` keeps its file, for export and import."""
    return cache_dir / f"basis-{shape.digest[:16]}-r{rank}.safetensors"


# ------------------------------------------------------------------------------- the known ones


class BasisFiles(Protocol):
    """Where a ``BasisStore``'s files are shared with other hosts."""

    def fetch(self, basis_id: str) -> Path:
        """Where the file is, which need not exist."""
        ...

    def send(self, basis_id: str) -> None:
        """Let other hosts have it: durable when this returns."""
        ...


class BasisStore:
    """The known bases, by id, each durably kept as ``<directory>/<id>.safetensors``.

    Thread-safe. All of them stay in memory, where matching an upload needs them; callers bound
    their number with ``limit``.

    Args:
        directory: made if it is missing.
        files: of the same directory, when other hosts need what is added.
    """

    def __init__(self, directory: Path, files: BasisFiles | None = None) -> None:
        self._directory = directory
        self._files = files
        self._lock = threading.Lock()
        self._bases: dict[str, Basis] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.glob("*.safetensors")):
            try:
                basis = load_basis(path)
            except AdapterRejected as error:
                log.error("basis %s is unusable, so are the adapters on it: %s", path, error)
                continue
            if basis.id != path.stem:
                log.error("basis %s is damaged, its sha256 is %s", path, basis.id)
                continue
            self._bases[basis.id] = basis

    def get(self, basis_id: str) -> Basis | None:
        """The basis of that id, or None."""
        with self._lock:
            return self._bases.get(basis_id)

    def all(self) -> tuple[Basis, ...]:
        """Every known basis, oldest first since this process started, else by id."""
        with self._lock:
            return tuple(self._bases.values())

    def add(self, basis: Basis, *, limit: int | None = None) -> bool:
        """Keep a basis; durable when this returns True. Adding a known one changes nothing.

        Args:
            basis: what to keep.
            limit: refuse (return False, change nothing) when this many bases of the same base are
                known that uploads brought, or that corrections needed, whichever this one is.
        """
        with self._lock:
            if basis.id in self._bases:
                return True
            alike = sum(
                (known.kind in CORRECTION_METHODS) == (basis.kind in CORRECTION_METHODS)
                and known.kind != "canonical"
                and known.base_digest == basis.base_digest
                for known in self._bases.values()
            )
            if limit is not None and alike >= limit:
                return False
            save_basis(basis, self._directory / f"{basis.id}.safetensors")
            if self._files is not None:
                self._files.send(basis.id)
            self._bases[basis.id] = basis
            return True

    def find(self, basis_id: str, shape: BaseShape) -> Basis | None:
        """As ``get``, also what another process has added since this store was opened.

        Raises:
            AdapterRejected, OSError: as ``load_basis``.
        """
        basis = self.get(basis_id)
        if basis is not None:
            return basis
        path = self._directory / f"{basis_id}.safetensors"
        if self._files is not None:
            path = self._files.fetch(basis_id)
        try:
            basis = load_basis(path, shape)
        except FileNotFoundError:
            return None
        if basis.id != basis_id:
            raise AdapterRejected(path.name, f"has sha256 {basis.id}")
        with self._lock:
            return self._bases.setdefault(basis_id, basis)
