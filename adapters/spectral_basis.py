"""A base's own singular vectors, in full: what SVF and SVFT adapters are written in.

Owns the thin SVD ``W = U diag(σ) Vᵀ`` of every target, how it is computed, the folder that keeps
it, and the probes by which a file says which one it means. A basis of LoRA-XS (``basis.py``) is a
few columns of ``U``, for every target, in memory; this is all of them, twice the size of the base,
so it is computed, stored and read target by target, and only for targets that an adapter changes.

Kept per target as ``<folder>/<id>/<target>.safetensors``: ``U (d_out, k)``, ``V (d_in, k)`` and
``S (k)``, float32, ``k = min(d_out, d_in)``, σ descending. Computed in float64 on the CPU, with
the sign rule of ``basis.compute_basis``: each column of U has a positive dot product with a seeded
vector, and V follows. Two machines agree where singular values differ; where they do not, the
vectors are no property of the base, which is why probes are compared and not assumed: those of a
file when it is read, those of a record whenever it is served (``spectral_probe.py``).
"""

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.adapters.basis import PROBE_COLUMNS, probe, seeded_columns
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.container import read_tensors, tensor_chunks, write_atomically
from shoal.adapters.spec import BaseShape, Target
from shoal.adapters.weights import WeightOf

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Admit = Callable[[Collection[Target]], None]

# A stored SVD must give the weight back, and be orthonormal, along this many seeded directions.
_CHECKS = 2
# Relative; float32 rounding leaves 1e-6.
_TOLERANCE = 1e-4


class Factors(NamedTuple):
    """The thin SVD of one target, float32 on the CPU.

    Attributes:
        u: ``(d_out, k)``, orthonormal columns.
        sigma: ``(k,)``, descending, not negative.
        v: ``(d_in, k)``, orthonormal columns.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor


class Ends(NamedTuple):
    """The seeded ends of what adapters change, turned into singular components; float64.

    Attributes:
        u: ``UᵀP (k, PROBE_COLUMNS)``.
        v: ``VᵀQ (k, PROBE_COLUMNS)``.
    """

    u: Tensor
    v: Tensor


class SpectralBasis:
    """The singular vectors of one base, by target. Thread-safe; one is computed at a time.

    Attributes:
        id: ``svd-`` and the leading 60 digits of the base's digest.
        shape: the base.
    """

    def __init__(
        self,
        weight_of: WeightOf,
        shape: BaseShape,
        folder: Path,
        progress: Progress | None = None,
        admit: Admit | None = None,
    ) -> None:
        """Reads and computes nothing.

        Args:
            weight_of: the checkpoint's weights, not rounded to what the server runs in.
            folder: a cache; bases of other digests may share it.
            progress: told by ``prepare`` of (targets done, targets to compute).
            admit: asked by ``prepare`` before it computes anything; may raise AdapterTooLarge.
        """
        self.id = f"svd-{shape.digest[:60]}"
        self.shape = shape
        self._weight_of = weight_of
        self._folder = folder / self.id
        self._progress = progress
        self._admit = admit
        self._lock = threading.Lock()
        # Small, and asked for by every upload.
        self._sigmas: dict[Target, Tensor] = {}
        self._probes: dict[Target, Tensor] = {}
        self._ends: dict[Target, Ends] = {}

    def factors(self, target: Target) -> Factors:
        """The SVD of one target: read, or computed and stored the first time.

        Costs a file of ``4·(d_out + d_in + 1)·k`` bytes, or one float64 SVD, with some six times
        the float64 weight in memory for as long. On one core: 1.6 s for a layer of SmolLM2-135M,
        3.3 s at 1024 x 4096, 4 s at 2048 x 2048; it grows with ``k² · max(d_out, d_in)``.

        Raises:
            OSError: the folder cannot be read or written.
        """
        with self._lock:
            return self._factors(target)

    def sigma(self, target: Target) -> Tensor:
        """``(k,)`` float32; kept in memory once known."""
        return self._small(target)[0]

    def probe(self, target: Target) -> Tensor:
        """``(k, PROBE_COLUMNS)`` float32: ``basis.probe`` of U. Row i tells column i and its sign;
        V has the same sign, because ``W v_i = σ_i u_i``."""
        return self._small(target)[1]

    def ends(self, target: Target) -> Ends:
        """What ``spectral_probe.py`` needs of the vectors that ``factors`` gave last."""
        return self._small(target)[2]

    def prepare(self, targets: Collection[Target]) -> None:
        """Have the SVDs of ``targets`` stored, one after the other, with progress.

        Raises:
            AdapterTooLarge: whoever is to use them has no room for them.
        """
        if self._admit is not None:
            self._admit(targets)
        missing = [t for t in targets if t not in self._sigmas and not self._path(t).exists()]
        for done, target in enumerate(missing):
            self._tell(done, len(missing))
            self.factors(target)
        if missing:
            self._tell(len(missing), len(missing))

    def _tell(self, done: int, count: int) -> None:
        if self._progress is not None:
            self._progress(done, count)

    def _small(self, target: Target) -> tuple[Tensor, Tensor, Ends]:
        with self._lock:
            if target not in self._probes:
                self._factors(target)
            return self._sigmas[target], self._probes[target], self._ends[target]

    def _factors(self, target: Target) -> Factors:
        """``factors``, with the lock held."""
        path = self._path(target)
        weight = self._weight_of(target).detach().cpu()
        found = self._stored(path, target, weight) if path.exists() else None
        if found is None:
            found = thin_svd(weight, target)
            tensors = {"U": found.u, "S": found.sigma, "V": found.v}
            try:
                write_atomically(path, tensor_chunks(tensors, self._metadata(target)))
            except OSError as error:  # it costs time at the next start, nothing else
                log.warning("an SVD is not kept for the next start: %s", error)
        # Every time: the file may be another than it was, and what is told is of what is given.
        self._sigmas[target] = found.sigma
        self._probes[target] = probe(found.u, target)
        self._ends[target] = _ends(found, target)
        return found

    def _path(self, target: Target) -> Path:
        return self._folder / f"{target}.safetensors"

    def _metadata(self, target: Target) -> dict[str, str]:
        return {
            "format": "shoal-svd",
            "version": "1",
            "base_digest": self.shape.digest,
            "target": str(target),
        }

    def _stored(self, path: Path, target: Target, weight: Tensor) -> Factors | None:
        """What a file holds, or None when it is damaged or of something else."""
        try:
            with path.open("rb") as file:
                tensors, metadata = read_tensors(file, path.stat().st_size, path.name)
            if metadata != self._metadata(target) or set(tensors) != {"U", "S", "V"}:
                raise AdapterRejected(path.name, f"is not the SVD of {target} of this base")
            found = Factors(tensors["U"], tensors["S"], tensors["V"])
            _check(found, weight, target, path.name)
        except AdapterRejected as error:
            log.warning("computing an SVD again: %s is unusable: %s", path, error)
            return None
        return found


@torch.no_grad()
def thin_svd(weight: Tensor, target: Target) -> Factors:
    """The canonical thin SVD of ``weight (d_out, d_in)``; see the module."""
    u, sigma, vt = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    direction = seeded_columns(target, len(u), 1, "sign")[:, 0]
    signs = torch.where(direction @ u < 0, -1.0, 1.0)
    v = vt.T * signs
    return Factors((u * signs).float(), sigma.float(), v.float().contiguous())


def sigma_probe(sigma: Tensor, target: Target) -> Tensor:
    """What identifies singular values where signs do not matter: ``(PROBE_COLUMNS,)`` float32.

    Seeded weighted sums of ``sigma (k,)``. Two bases that differ by one part in a thousand have
    probes that differ by about as much of ``‖σ‖``.
    """
    product: Tensor = sigma.double() @ seeded_columns(target, len(sigma), PROBE_COLUMNS, "sigma")
    return product.float()


def _ends(found: Factors, target: Target) -> Ends:
    p = seeded_columns(target, len(found.u), PROBE_COLUMNS, "delta-out")
    q = seeded_columns(target, len(found.v), PROBE_COLUMNS, "delta-in")
    return Ends(found.u.double().T @ p, found.v.double().T @ q)


def _check(found: Factors, weight: Tensor, target: Target, where: str) -> None:
    """AdapterRejected unless ``found`` is an SVD of ``weight``, as far as a few directions tell."""
    d_out, d_in = weight.shape
    k = min(weight.shape)
    expected = ((d_out, k), (k,), (d_in, k))
    if tuple(tuple(part.shape) for part in found) != expected:
        raise AdapterRejected(where, f"shapes must be {[list(shape) for shape in expected]}")
    if any(part.dtype != torch.float32 for part in found):
        raise AdapterRejected(where, "must be float32")
    sigma = found.sigma
    if bool((sigma < 0).any()) or bool((sigma[1:] > sigma[:-1]).any()):
        raise AdapterRejected(where, "singular values must descend to no less than zero")
    inner = seeded_columns(target, k, _CHECKS, "svd-check").float()
    along = found.v @ inner
    for name, kept, back in (
        ("UᵀU is not I", inner, found.u.T @ (found.u @ inner)),
        ("VᵀV is not I", inner, found.v.T @ along),
    ):
        if not (back - kept).norm() <= _TOLERANCE * kept.norm():
            raise AdapterRejected(where, name)
    error = (weight.float() @ along - found.u @ (sigma[:, None] * inner)).norm()
    if not error <= _TOLERANCE * max(float(sigma[0]), 1e-30) * inner.norm():
        raise AdapterRejected(where, "W V is not U diag(σ)")
