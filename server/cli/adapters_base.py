"""The base that ``shoal adapters check`` and ``convert`` read an adapter against, without a server.

Loads no more than an adapter needs: the config for its shapes; single weights for those that depend
on them, the shared basis for LoRA-XS and what was trained on a residual base, singular vectors for
SVF and SVFT. Reads the bases that the local registry knows and writes none there.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # torch takes seconds that `--help` should not
    from torch import Tensor

    from shoal.adapters.basis import Basis, BasisStore
    from shoal.adapters.deltas import BaseParts
    from shoal.adapters.spec import BaseShape, Target
    from shoal.adapters.spectral_basis import SpectralBasis
    from shoal.adapters.weights import AdapterWeights, WeightOf

XsLayout = Literal["official", "compact"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OfflineBase:
    """A base on disk, and a folder of known bases that may be written to.

    Attributes:
        path: Hugging Face directory or ``.gguf`` file.
        shape, weight_of: weights are read when they are asked for.
        canonical: the base's own basis; empty when it was not asked for.
        bases: a throw-away copy of what the registry knows.
        spectral: the base's singular vectors, computed when they are asked for and cached; None
            when they were not asked for.
    """

    path: Path
    shape: "BaseShape"
    weight_of: "WeightOf"
    canonical: "Basis"
    bases: "BasisStore"
    spectral: "SpectralBasis | None" = None

    def read(
        self,
        files: Mapping[str, Path],
        *,
        max_bytes: int,
        max_bases: int,
        max_rank: int | None = None,
    ) -> "AdapterWeights":
        """Read an adapter as an upload would be; AdapterRejected, AdapterTooLarge."""
        from shoal.adapters.formats.base import PRODUCT_RANK_MAX
        from shoal.adapters.reading import read_adapter

        return read_adapter(
            files,
            shape=self.shape,
            weight_of=self.weight_of,
            bases=self.bases,
            canonical=self.canonical,
            max_bytes=max_bytes,
            max_bases=max_bases,
            max_rank=PRODUCT_RANK_MAX if max_rank is None else max_rank,
            spectral=self.spectral,
        )

    def basis_of(self, basis_id: str) -> "Basis":
        """The basis with that id, which an adapter that was read here is on; else KeyError."""
        if basis_id == self.canonical.id:
            return self.canonical
        found = self.bases.get(basis_id)
        if found is None:
            raise KeyError(basis_id)
        return found

    def parts(self) -> "BaseParts":
        """What spelling an adapter out takes."""
        from shoal.adapters.deltas import BaseParts

        def singular_of(target: "Target") -> "tuple[Tensor, Tensor, Tensor]":
            assert self.spectral is not None, "only what was read here is spelled out"
            return self.spectral.factors(target)

        return BaseParts(self.shape, self.weight_of, self.basis_of, singular_of)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which base, and which registry's bases."""
    parser.add_argument(
        "--base",
        default="smollm2",
        metavar="MODEL",
        help="Hugging Face directory, .gguf file or smollm2 (default: %(default)s)",
    )
    parser.add_argument(
        "--basis-rank", type=positive, default=64, help="as of the server (default: %(default)s)"
    )
    parser.add_argument("--registry", metavar="URL", help="whose known bases count; as for serve")
    parser.add_argument("--store", metavar="URL", help="as for serve")


class Look(NamedTuple):
    """What files look like, from their names and config alone.

    Attributes:
        layout: of LoRA-XS; None for anything else.
        corrected: whether it was trained on a residual base (PiSSA, OLoRA, ``base_correction``).
        spectral: whether it is SVF or SVFT.
        based: whether a shared basis of the base may hold a part of it.
    """

    layout: XsLayout | None = None
    corrected: bool = False
    spectral: bool = False
    based: bool = False


def look_at(files: Mapping[str, Path]) -> Look:
    """What reading these files is going to need.

    Raises:
        AdapterRejected, AdapterTooLarge: a damaged config or header.
    """
    from shoal.adapters.formats import lora_xs
    from shoal.adapters.formats.config_fields import CONFIG_FILE, is_set
    from shoal.adapters.formats.container import parse_header, read_header, read_json
    from shoal.adapters.formats.keys import split_name
    from shoal.adapters.reading import WEIGHTS_FILE

    if not files.keys() >= {CONFIG_FILE, WEIGHTS_FILE}:
        return Look()
    path = files[WEIGHTS_FILE]
    size = path.stat().st_size
    with path.open("rb") as file:
        header, start = read_header(file, size, WEIGHTS_FILE)
    # Modules of rank 0 are the format's to judge.
    entries, _ = parse_header(header, size - start, WEIGHTS_FILE, empty=True)
    config = read_json(files[CONFIG_FILE], CONFIG_FILE)
    layout: XsLayout | None = None
    if lora_xs.FORMAT.markers & {split_name(name)[1] for name in entries}:
        layout = "compact" if config.get("peft_type") == "LORA_XS" else "official"
    moved = config.get("init_lora_weights") in ("pissa", "olora")
    corrected = moved or is_set(config.get("base_correction"))
    peft_type = config.get("peft_type")
    based = layout is not None or corrected or peft_type == "TINYLORA"
    return Look(layout, corrected, peft_type in ("SVF", "SVFT"), based)


@contextmanager
def offline_base(
    args: argparse.Namespace, *, need_basis: bool, need_spectral: bool = False
) -> Iterator[OfflineBase]:
    """Open ``args.base``.

    Args:
        args: of `add_arguments`.
        need_basis: load the canonical basis (computing it the first time) and the known ones.
        need_spectral: give the base's singular vectors.

    Raises:
        ModelError: no such base, or not one that can be served.
        AdapterError, RegistryError, OSError: a basis or the registry's place cannot be read.
    """
    from shoal.adapters.base import base_digest
    from shoal.adapters.basis import Basis, BasisStore
    from shoal.server.model.pull import resolve_model
    from shoal.server.model.weights import read_config

    path = resolve_model(args.base)
    # Hashing reads the whole base: only what is cached by it needs it.
    digest = base_digest(path) if need_basis or need_spectral else ""
    shape = read_config(path).base_shape(path.stem, digest)
    weight_of = _weights_of(path, shape)
    with tempfile.TemporaryDirectory(prefix="shoal-bases-") as folder:
        bases = BasisStore(Path(folder))
        canonical = Basis("", 0, {}, "canonical")
        if need_basis:
            canonical = _canonical(weight_of, shape, args.basis_rank)
            for known in _known_bases(args):
                bases.add(known)
        spectral = _spectral(weight_of, shape) if need_spectral else None
        yield OfflineBase(path, shape, weight_of, canonical, bases, spectral)


def _weights_of(path: Path, shape: "BaseShape") -> "WeightOf":
    """Weights read at the first use: one by one from a directory, all together from a GGUF."""
    from functools import cache

    from torch import Tensor

    from shoal.adapters.merging import Checkpoint
    from shoal.adapters.spec import Target

    @cache
    def source() -> "WeightOf":
        if path.is_dir():
            return Checkpoint(path, shape).weight_of
        import torch

        from shoal.server.model.weights import load_model

        decoder = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
        return decoder.weight_of

    def weight_of(target: Target) -> Tensor:
        return source()(target)

    return weight_of


def _canonical(weight_of: "WeightOf", shape: "BaseShape", rank: int) -> "Basis":
    import platformdirs

    from shoal.adapters.basis import canonical_basis, canonical_path

    cache = platformdirs.user_cache_path("shoal") / "bases"
    if not canonical_path(cache, shape, rank).exists():
        print(f"computing the basis of {shape.name} once; it is kept in {cache}", file=sys.stderr)
    return canonical_basis(weight_of, shape, rank, cache)


def _spectral(weight_of: "WeightOf", shape: "BaseShape") -> "SpectralBasis":
    import platformdirs

    from shoal.adapters.spectral_basis import SpectralBasis

    cache = platformdirs.user_cache_path("shoal") / "bases"

    def told(done: int, of: int) -> None:
        if done == 0:
            print(f"computing {of} SVDs of {shape.name} once; kept in {cache}", file=sys.stderr)

    return SpectralBasis(weight_of, shape, cache, told)


def _known_bases(args: argparse.Namespace) -> Iterator["Basis"]:
    from shoal.adapters.basis import load_basis
    from shoal.adapters.errors import AdapterRejected
    from shoal.adapters.library import places
    from shoal.adapters.registry.shared_bases import SharedBases
    from shoal.server.config import ServeConfig

    registry_url = ServeConfig(registry=args.registry).registry_url
    shared = SharedBases.open(places(registry_url, args.store))
    for path in sorted(shared.folder.glob("*.safetensors")):
        try:
            yield load_basis(path)
        except AdapterRejected as error:
            log.warning("known basis left out: %s", error)


def positive(text: str) -> int:
    """An argument that must be a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
