"""``shoal adapters check DIR``: what a server would make of an adapter, without a server.

Reads the adapter exactly as an upload is read, against throw-away copies of the known bases, and
prints what it would be served as and cost, or why it would be refused. Changes no adapter, registry
or store; only the caches of the base (its digest, its basis) may grow.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.server.cli import adapters_base

if TYPE_CHECKING:  # torch takes seconds that `--help` should not
    from shoal.adapters.spec import BaseShape, Section, Target
    from shoal.adapters.weights import AdapterWeights
    from shoal.server.cli.adapters_base import OfflineBase, XsLayout

HELP = "say what a server would make of an adapter directory; needs no server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="an adapter directory")
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")
    adapters_base.add_arguments(parser)


@dataclass(frozen=True, slots=True)
class Report:
    """What a server would make of an adapter.

    Attributes:
        format: which reader took it; for LoRA-XS with its layout.
        family, rank: of its record in the device bank.
        ranks, scales: those that occur among the targets.
        num_targets, targets: how many, and which.
        made_for: ``base_model_name_or_path`` of its config, which is a name and proves nothing.
        needs: whether it is right on exactly one base's weights, or on any base of its shapes.
        basis: which shared factors it is on; None for adapters that use none.
        sections: what is applied, in order.
        digest: of its record, by which registries know the adapter.
        file_bytes, record_bytes: on disk as it is here, and as a registry stores it.
        bank_bytes: in the device bank, by dtype; whole units.
        row_bytes, shared_bytes: what a decode step reads for each such row, and for all such rows
            together, in bfloat16.
        multiply_adds: per token.
    """

    format: str
    family: str
    rank: int
    ranks: list[int]
    scales: list[float]
    num_targets: int
    targets: str
    made_for: str | None
    needs: str
    basis: str | None
    sections: list[dict[str, str]]
    digest: str
    file_bytes: int
    record_bytes: int
    bank_bytes: dict[str, int]
    row_bytes: int
    shared_bytes: int
    multiply_adds: int


def run(args: argparse.Namespace) -> int:
    """0: it would be served. 1: it would be refused, or could not be checked."""
    from shoal.adapters.errors import AdapterError, AdapterRejected, AdapterTooLarge
    from shoal.adapters.registry.errors import RegistryError
    from shoal.server.model.config import ModelError

    if not args.directory.is_dir():
        print(f"error: {args.directory} is no directory", file=sys.stderr)
        print("hint: give the folder that holds adapter_config.json", file=sys.stderr)
        return 1
    try:
        report = _report(args)
    except AdapterRejected as refusal:
        return _refused(args, refusal.where, refusal.rule)
    except AdapterTooLarge as refusal:
        return _refused(args, "size", str(refusal))
    except (AdapterError, ModelError, RegistryError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        print("hint: --base must be readable; it is what the adapter is for", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"directory": str(args.directory), "served": True} | asdict(report)))
    else:
        _print(f"{args.directory}: can be served", _fields(report))
    return 0


def _refused(args: argparse.Namespace, where: str, rule: str) -> int:
    said = {"where": where, "rule": rule}
    if args.json:
        print(json.dumps({"directory": str(args.directory), "served": False} | said))
    else:
        _print(f"{args.directory}: refused", said)
    return 1


def _report(args: argparse.Namespace) -> Report:
    import torch

    from shoal.adapters.families.costs import adapter_cost, launches
    from shoal.adapters.formats.config_fields import CONFIG_FILE
    from shoal.adapters.formats.container import printable, read_json
    from shoal.adapters.library import UPLOADED_BASES_MAX
    from shoal.adapters.packing import make_spec
    from shoal.adapters.reading import adapter_files
    from shoal.adapters.record import record_digest, to_record
    from shoal.adapters.spec import UNIT_ELEMENTS
    from shoal.server.config import ServeConfig

    files = adapter_files(args.directory)
    look = adapters_base.look_at(files)
    limit = ServeConfig().max_upload_bytes
    with adapters_base.offline_base(
        args, need_basis=look.based, need_spectral=look.spectral
    ) as base:
        known = {basis.id for basis in base.bases.all()}
        weights = base.read(files, max_bytes=limit, max_bases=UPLOADED_BASES_MAX)
        record = to_record(weights)
        spec = make_spec(weights, base.shape, record_digest(record))
        basis = _basis(weights, base, known, files, limit, look.layout)
        shape = base.shape
    told = read_json(files[CONFIG_FILE], CONFIG_FILE).get("base_model_name_or_path")
    cost = adapter_cost(spec, shape, weights.tensors.keys())
    units = -(-spec.packed_elements // UNIT_ELEMENTS)
    return Report(
        format=weights.format if look.layout is None else f"{weights.format}, {look.layout} layout",
        family=spec.family,
        rank=spec.rank,
        ranks=sorted({parts[0].shape[0] for parts in weights.tensors.values()}),
        scales=sorted(set(weights.scales.values())),
        num_targets=len(weights.tensors),
        targets=describe(weights.tensors, shape),
        made_for=printable(told) if isinstance(told, str) and told else None,
        needs=_needs(weights, look.corrected),
        basis=basis,
        sections=[
            {"section": _section(section, weights), "launches": launches(section)}
            for section in spec.sections
        ],
        digest=spec.digest,
        file_bytes=sum(path.stat().st_size for path in files.values()),
        record_bytes=len(record),
        bank_bytes={
            str(dtype).removeprefix("torch."): units * UNIT_ELEMENTS * dtype.itemsize
            for dtype in (torch.bfloat16, torch.float32)
        },
        row_bytes=cost.own * torch.bfloat16.itemsize,
        shared_bytes=cost.shared * torch.bfloat16.itemsize,
        multiply_adds=cost.multiply_adds,
    )


def _needs(weights: "AdapterWeights", corrected: bool) -> str:
    # A correction may have become factors of the adapter: they are of this base all the same.
    exact = weights.basis_id is not None or weights.row_scales or corrected
    return "the weights it was trained on" if exact else "a base of these shapes"


def _section(section: "Section", weights: "AdapterWeights") -> str:
    """``core r=16`` and such."""
    if section.kind == "scale":
        return "scale of every output"
    if section.kind == "spectral":
        return f"spectral, at most {section.rank} entries a module"
    name = f"{section.kind} r={section.rank}"
    correction = weights.correction
    return (
        name if correction is None or section.kind != "core" else f"{correction.method} as {name}"
    )


def _fields(report: Report) -> dict[str, str]:
    """The same in words."""
    ranks = _distinct(report.ranks)
    if report.family == "fold" and report.rank != max(report.ranks):
        ranks += f" (packed at {report.rank}, their common multiple)"
    row = f"a row reads {report.row_bytes:,} bytes a step in bfloat16"
    if report.shared_bytes:
        row += f", all such rows together {report.shared_bytes:,} of the base's"
    made_for = f"; made for {report.made_for}" if report.made_for else ""
    return {
        "family": report.family,
        "format": report.format,
        "rank": ranks,
        "targets": report.targets,
        "scale": _distinct(report.scales),
        "base": f"needs {report.needs}{made_for}",
        **({"basis": report.basis} if report.basis else {}),
        # On CUDA there is none of it unless asked for.
        **(
            {
                "server": f"needs --spectral-memory {report.shared_bytes} in bfloat16, "
                "twice that in float32; adapters that change the same modules share it"
            }
            if report.family == "spectral"
            else {}
        ),
        "served": " + ".join(each["section"] for each in report.sections),
        "on disk": f"{report.file_bytes:,} bytes, as a record {report.record_bytes:,}",
        "packed": ", ".join(
            f"{size:,} bytes in {name}" for name, size in report.bank_bytes.items()
        ),
        "decode": f"{row}, and takes {report.multiply_adds:,} multiply-adds a token",
        "launches": "; ".join(f"{each['section']}: {each['launches']}" for each in report.sections),
        "digest": report.digest,
    }


def _basis(
    weights: "AdapterWeights",
    base: "OfflineBase",
    known: set[str],
    files: Mapping[str, Path],
    limit: int,
    layout: "XsLayout | None",
) -> str | None:
    """Which shared factors an adapter is on, or why a LoRA-XS one is on none; None for others."""
    from shoal.adapters.formats.lora_xs import FACTOR_ERROR_MAX, ORTHONORMALITY_ERROR_MAX

    if weights.correction is not None:
        return _named(weights.correction.basis_id, base, known, "of its correction")
    if weights.family == "spectral":
        return f"the singular vectors of {base.shape.name} ({weights.basis_id})"
    if weights.basis_id is not None:
        return _named(weights.basis_id, base, known, "its own")
    if layout is None:
        return None
    uploaded = sum(basis.kind == "uploaded" for basis in base.bases.all())
    # With room for one more, what stays `lora` has factors that make no basis.
    if base.read(files, max_bytes=limit, max_bases=uploaded + 1).family == "core":
        return f"none, served as lora: {uploaded} uploaded bases are known, which is the limit"
    return (
        "none, served as lora with its own factors: on some target "
        f"‖BᵀB−I‖ > {ORTHONORMALITY_ERROR_MAX:g} or ‖A−BᵀW‖/‖A‖ > {FACTOR_ERROR_MAX:g}"
    )


def _named(basis_id: str, base: "OfflineBase", known: set[str], otherwise: str) -> str:
    """How a basis is known, its id and its rank."""
    if basis_id == base.canonical.id:
        which = "canonical"
    elif basis_id in known:
        which = "known"
    else:
        which = f"{otherwise}, kept as a further one"
    return f"{which} ({basis_id[:12]}), rank {base.basis_of(basis_id).rank}"


def describe(targets: Iterable["Target"], shape: "BaseShape") -> str:
    """How many, and which: ``14: 7 modules x 2 layers`` where that says it all."""
    chosen = set(targets)
    modules = {target.module for target in chosen}
    if len(chosen) == len(modules) * shape.num_layers and len(modules) == len(shape.dims):
        return f"{len(chosen)}: {len(modules)} modules x {shape.num_layers} layers"
    return f"{len(chosen)}: {compress(sorted(chosen, key=list(shape.targets()).index))}"


def compress(targets: Iterable["Target"]) -> str:
    """``layers 0-29: q_proj v_proj``: runs of layers with the same modules."""
    modules: dict[int, list[str]] = {}
    for layer, module in targets:
        modules.setdefault(layer, []).append(module)

    def run_key(entry: tuple[int, int]) -> tuple[int, tuple[str, ...]]:
        position, layer = entry
        return layer - position, tuple(modules[layer])  # consecutive layers share the difference

    runs = []
    for (_, names), entries in groupby(enumerate(sorted(modules)), run_key):
        layers = [layer for _, layer in entries]
        several = f"layers {layers[0]}-{layers[-1]}"
        which = f"layer {layers[0]}" if len(layers) == 1 else several
        runs.append(f"{which}: {' '.join(names)}")
    return "; ".join(runs)


def _distinct(values: Iterable[float]) -> str:
    different = sorted(set(values))
    if len(different) > 8:
        return f"{different[0]:g} to {different[-1]:g} ({len(different)} different)"
    return ", ".join(f"{value:g}" for value in different)


def _print(title: str, fields: Mapping[str, str]) -> None:
    print(title)
    for name, value in fields.items():
        print(f"  {name:<8} {value}")
