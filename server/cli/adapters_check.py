"""``shoal adapters check DIR``: what a server would make of an adapter, without a server.

Reads the adapter exactly as an upload is read, against throw-away copies of the known bases, and
prints what it would be served as and cost, or why it would be refused. Changes no adapter, registry
or store; only the caches of the base (its digest, its basis) may grow.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.server.cli import adapters_base

if TYPE_CHECKING:  # torch takes seconds that `--help` should not
    from shoal.adapters.spec import Target
    from shoal.adapters.weights import AdapterWeights
    from shoal.server.cli.adapters_base import OfflineBase, XsLayout

HELP = "say what a server would make of an adapter directory; needs no server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="an adapter directory")
    adapters_base.add_arguments(parser)


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
        _print(f"{args.directory}: refused", {"where": refusal.where, "rule": refusal.rule})
        return 1
    except AdapterTooLarge as refusal:
        _print(f"{args.directory}: refused", {"where": "size", "rule": str(refusal)})
        return 1
    except (AdapterError, ModelError, RegistryError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        print("hint: --base must be readable; it is what the adapter is for", file=sys.stderr)
        return 1
    _print(f"{args.directory}: can be served", report)
    return 0


def _report(args: argparse.Namespace) -> dict[str, str]:
    import torch

    from shoal.adapters.library import UPLOADED_BASES_MAX
    from shoal.adapters.packing import make_spec
    from shoal.adapters.reading import adapter_files
    from shoal.adapters.record import record_digest, to_record
    from shoal.server.config import ServeConfig

    files = adapter_files(args.directory)
    layout = adapters_base.look_at(files).layout
    limit = ServeConfig().max_upload_bytes
    with adapters_base.offline_base(args, need_basis=layout is not None) as base:
        known = {basis.id for basis in base.bases.all()}
        weights = base.read(files, max_bytes=limit, max_bases=UPLOADED_BASES_MAX)
        spec = make_spec(weights, base.shape, record_digest(to_record(weights)))
        basis = "" if layout is None else _basis(weights, base, known, files, limit)
    on_disk = sum(path.stat().st_size for path in files.values())
    packed = {
        name: f"{spec.packed_elements * dtype.itemsize:,} bytes in {name}"
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    }
    ranks = [parts[0].shape[0] for parts in weights.tensors.values()]
    at = "" if spec.rank == max(ranks) else f" (packed at {spec.rank}, their common multiple)"
    shared = "; the basis is shared by all rows" if spec.family == "core" else ""
    return {
        "family": spec.family,
        "format": _format(weights, layout),
        "rank": _distinct(ranks) + at,
        "targets": f"{len(ranks)}: {compress(weights.tensors)}",
        "scale": _distinct(weights.scales.values()),
        **({"basis": basis} if basis else {}),
        "on disk": f"{on_disk:,} bytes",
        "packed": ", ".join(packed.values()),
        "decode": f"a row reads its packed bytes once per step: {packed['bfloat16']}{shared}",
        "digest": spec.digest,
    }


def _format(weights: "AdapterWeights", layout: "XsLayout | None") -> str:
    return weights.format if layout is None else f"{weights.format}, {layout} layout"


def _basis(
    weights: "AdapterWeights",
    base: "OfflineBase",
    known: set[str],
    files: Mapping[str, Path],
    limit: int,
) -> str:
    """Which basis a LoRA-XS adapter is on, or why on none."""
    from shoal.adapters.formats.lora_xs import FACTOR_ERROR_MAX, ORTHONORMALITY_ERROR_MAX

    if weights.basis_id is not None:
        if weights.basis_id == base.canonical.id:
            which = "canonical"
        elif weights.basis_id in known:
            which = "known"
        else:
            which = "its own, kept as a further one"
        return f"{which} ({weights.basis_id[:12]}), rank {_rank(base, weights)}"
    uploaded = sum(basis.kind == "uploaded" for basis in base.bases.all())
    # With room for one more, what stays `lora` has factors that make no basis.
    if base.read(files, max_bytes=limit, max_bases=uploaded + 1).family == "core":
        return f"none, served as lora: {uploaded} uploaded bases are known, which is the limit"
    return (
        "none, served as lora with its own factors: on some target "
        f"‖BᵀB−I‖ > {ORTHONORMALITY_ERROR_MAX:g} or ‖A−BᵀW‖/‖A‖ > {FACTOR_ERROR_MAX:g}"
    )


def _rank(base: "OfflineBase", weights: "AdapterWeights") -> int:
    assert weights.basis_id is not None
    return base.basis_of(weights.basis_id).rank


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
