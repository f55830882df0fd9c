"""Many random LoRA-XS adapters of a real base, as an archive for ``shoal adapters import``.

They are written in the base's canonical basis, each with an ``R`` of its own on every linear, so
they cost what trained ones cost; what they make of the text is noise. Equal for equal arguments.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import torch

from shoal.adapters.compact import compact
from shoal.adapters.packing import make_spec
from shoal.adapters.record import to_record
from shoal.adapters.registry.archive import BATCH_ADAPTERS, BATCH_BYTES, write_archive
from shoal.adapters.registry.bulk import Adapter, Version
from shoal.adapters.registry.catalog import Content
from shoal.adapters.spec import BaseShape
from shoal.adapters.weights import AdapterWeights
from shoal.server.assemble import canonical_file
from shoal.server.model.dummy import adapter_std
from shoal.server.model.pull import resolve_model

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DummyArchive:
    """What to make.

    Attributes:
        model: the base, as ``shoal serve`` takes it.
        adapters: how many; named ``u0000000`` and on, without an owner.
        rank: of each ``R``, on every linear of every layer.
        seed: of their values. The first ``n`` adapters do not depend on how many there are.
        basis_rank: of the canonical basis.
    """

    model: str = "smollm2"
    adapters: int
    rank: int = 4
    seed: int = 0
    basis_rank: int = 64


def adapter_name(number: int) -> str:
    """The name of the ``number``-th adapter, from 0."""
    return f"u{number:07}"


def write_dummy_archive(
    asked: DummyArchive, out: BinaryIO, progress: Progress = lambda done, of: None
) -> None:
    """Write the archive to ``out``, which need not seek, in memory for one batch.

    Raises:
        ModelError: the model cannot be fetched or loaded.
        ValueError: the rank does not fit the model or its basis.
        OSError: of ``out``.
    """
    shape, basis = canonical_file(resolve_model(asked.model), asked.basis_rank)
    most = min(asked.basis_rank, *(min(dims) for dims in shape.dims.values()))
    if not 1 <= asked.rank <= most:
        raise ValueError(f"the rank is {asked.rank}: must be from 1 to {most} here")
    with basis.open("rb") as file:
        basis_id = hashlib.file_digest(file, "sha256").hexdigest()
    batches = _batches(asked, shape, basis_id)
    write_archive(out, batches, {basis_id: basis}, total=asked.adapters, progress=progress)


def _batches(
    asked: DummyArchive, shape: BaseShape, basis_id: str
) -> Iterator[tuple[list[Adapter], dict[str, bytes]]]:
    """They differ in the values of equally long records, so all else is made once."""
    zeros = torch.zeros(asked.rank, asked.rank)
    targets = shape.targets()
    weights = AdapterWeights(
        format="lora_xs",
        family="core",
        tensors=dict.fromkeys(targets, (zeros,)),
        scales=dict.fromkeys(targets, 1.0),
        basis_id=basis_id,
    )
    record = to_record(weights)
    elements = len(targets) * zeros.numel()
    head = hashlib.sha256(record[: -4 * elements])
    kept = compact(record)
    before = (kept or record)[: -4 * elements]
    packed_elements = make_spec(weights, shape, "0" * 64).packed_elements
    generator = torch.Generator().manual_seed(asked.seed)
    std = adapter_std("core", asked.rank)
    per_batch = max(1, min(BATCH_ADAPTERS, BATCH_BYTES // (4 * elements)))
    for first in range(0, asked.adapters, per_batch):
        # A whole one also at the end: what is drawn depends on how much is drawn at once.
        values = torch.randn(per_batch, elements, generator=generator).mul_(std).numpy()
        adapters: list[Adapter] = []
        records: dict[str, bytes] = {}
        for number, row in enumerate(values[: asked.adapters - first], start=first):
            sha256 = head.copy()
            sha256.update(row.data)
            digest = sha256.hexdigest()
            records[digest] = before + row.tobytes()
            content = Content(
                digest=digest,
                family="core",
                format="lora_xs",
                rank=asked.rank,
                bytes=len(record),
                packed_elements=packed_elements,
                basis_id=basis_id,
            )
            adapters.append(
                Adapter(
                    owner="",
                    name=adapter_name(number),
                    base_digest=shape.digest,
                    active=1,
                    versions=(Version(1, content, 0.0, "upload"),),
                )
            )
        yield adapters, records
