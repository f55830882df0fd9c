"""The canonical record: one byte sequence for one adapter, whatever file it came from.

Owns the form in which the registry stores an adapter and the digest that identifies its content.
It is a safetensors file: tensors ``layers.<layer>.<module>.<part>`` in a fixed order, and
everything else as JSON with sorted keys under the metadata key ``shoal``. It does not know upload
formats, names or versions.

========  =======  ====================================================================
family    parts    beside them
========  =======  ====================================================================
core      R        ``basis_id``
fold      D
lora      A, B     ``G``, row scales of some targets (version 2); or ``correction`` in
                   the JSON: method, basis_id, ranks, scales (version 2)
spectral  I, J, M  rows, columns and values of M's entries; ``P``, the probe of what each target
                   changes (``spectral_probe.py``); ``basis_id`` (version 2)
========  =======  ====================================================================

Version 2 is for what a reader of version 1 would not know, and only for that: an adapter has one
record.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.container import (
    DTYPES,
    JSON_BYTES_MAX,
    finite_number,
    parse_json,
    printable,
    read_tensors,
    tensor_chunks,
)
from shoal.adapters.spec import MODULES, BaseShape, Dims, Family, Target
from shoal.adapters.spectral_probe import PROBE_DTYPE, PROBE_SHAPE
from shoal.adapters.weights import CORRECTION_METHODS, AdapterWeights, Correction

PARTS: Mapping[Family, tuple[str, ...]] = {
    "core": ("R",),
    "fold": ("D",),
    "lora": ("A", "B"),
    "spectral": ("I", "J", "M"),
}
# Of a lora target, and not of every one.
ROW_SCALES = "G"
# Of every spectral target.
PROBE = "P"
INDICES = ("I", "J")
_BESIDE: Mapping[Family, tuple[str, ...]] = {"lora": (ROW_SCALES,), "spectral": (PROBE,)}
# Of other parts any float dtype that a file may have.
_DTYPES = {**dict.fromkeys(INDICES, (torch.int32,)), PROBE: (PROBE_DTYPE,)}

_WHERE = "record"
_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+)")
_ON_A_BASIS: tuple[Family, ...] = ("core", "spectral")


def to_record(weights: AdapterWeights) -> bytes:
    """The record of ``weights``: equal bytes if and only if the adapters are equal."""
    tensors = {
        f"{target}.{part}": tensor
        for target, parts in weights.tensors.items()
        for part, tensor in zip(PARTS[weights.family], parts, strict=True)
    }
    tensors |= {f"{target}.{ROW_SCALES}": g for target, g in weights.row_scales.items()}
    tensors |= {f"{target}.{PROBE}": probe for target, probe in weights.probes.items()}
    config: dict[str, object] = {
        "version": _version(weights),
        "format": weights.format,
        "family": weights.family,
        "basis_id": weights.basis_id,
        "scales": {str(target): float(weights.scales[target]) for target in weights.tensors},
    }
    correction = weights.correction
    if correction is not None:
        config["correction"] = {
            "method": correction.method,
            "basis_id": correction.basis_id,
            "ranks": {str(target): rank for target, rank in correction.ranks.items()},
            "scales": {
                str(target): float(correction.scales[target]) for target in correction.ranks
            },
        }
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return b"".join(tensor_chunks(tensors, {"shoal": text}))


def record_digest(data: bytes) -> str:
    """What identifies an adapter's content: sha256 (hex) of its record."""
    return hashlib.sha256(data).hexdigest()


def from_record(data: bytes, shape: BaseShape) -> AdapterWeights:
    """Read a record back and check it against the base.

    That a basis holds the columns that are asked of it, or is still the one that a spectral
    adapter's probes tell of, is not checked here.

    Raises:
        AdapterRejected: damaged, of another version, or made for a base of another shape.
    """
    tensors, metadata = read_tensors(io.BytesIO(data), len(data), _WHERE)
    # An unpaired surrogate passes here and is refused as bad UTF-8 below.
    text = metadata.get("shoal", "").encode(errors="surrogatepass")
    if len(text) > JSON_BYTES_MAX:
        raise AdapterRejected(_WHERE, f"its metadata exceeds {JSON_BYTES_MAX} bytes")
    config = parse_json(text, f"{_WHERE} metadata")
    if config.get("version") not in (1, 2):
        raise AdapterRejected(_WHERE, f"version {config.get('version')!r} must be 1 or 2")
    name, family, basis_id = (config.get(key) for key in ("format", "family", "basis_id"))
    if not isinstance(name, str) or not isinstance(family, str) or family not in PARTS:
        raise AdapterRejected(_WHERE, f"family must be one of {', '.join(PARTS)}")
    if (family in _ON_A_BASIS) != isinstance(basis_id, str):
        raise AdapterRejected(
            _WHERE, f"basis_id must be given for {' and '.join(_ON_A_BASIS)}, and only for them"
        )
    family = cast(Family, family)
    grouped, row_scales, probes = _group(tensors, family, shape)
    weights = AdapterWeights(
        format=name,
        family=family,
        tensors=grouped,
        scales=_scales(config.get("scales"), grouped, _WHERE),
        basis_id=basis_id,
        row_scales=row_scales,
        correction=_correction(config, family, shape),
        probes=probes,
    )
    if weights.correction is not None and row_scales:
        raise AdapterRejected(_WHERE, "must not have both a correction and row scales")
    if config["version"] != _version(weights):
        raise AdapterRejected(
            _WHERE, f"version {config['version']} must be {_version(weights)} for what it holds"
        )
    return weights


def _version(weights: AdapterWeights) -> int:
    new = weights.row_scales or weights.correction is not None or weights.family == "spectral"
    return 2 if new else 1


def _group(
    tensors: Mapping[str, Tensor], family: Family, shape: BaseShape
) -> tuple[dict[Target, tuple[Tensor, ...]], dict[Target, Tensor], dict[Target, Tensor]]:
    """The parts of each target, its row scales and probe where it has some; targets in order."""
    known = (*PARTS[family], *_BESIDE.get(family, ()))
    found: dict[Target, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        target = _target(stem) if part in known else None
        if target is None:
            raise AdapterRejected(printable(name), f"is not a tensor of a {family} record")
        if target.layer >= shape.num_layers:
            raise AdapterRejected(name, f"{shape.name} has layers 0 to {shape.num_layers - 1}")
        fitting = _DTYPES.get(part, tuple(DTYPES.values()))
        if tensor.dtype not in fitting:
            wanted = " or ".join(map(str, fitting))
            raise AdapterRejected(name, f"dtype {tensor.dtype} must be {wanted}")
        found.setdefault(target, {})[part] = tensor
    if not found:
        raise AdapterRejected(_WHERE, "holds no tensors")
    grouped, row_scales, probes = {}, {}, {}
    for target in sorted(found, key=lambda t: (t.layer, MODULES.index(t.module))):
        missing = [part for part in PARTS[family] if part not in found[target]]
        if missing:
            raise AdapterRejected(f"{target}.{missing[0]}", "is missing")
        dims = shape.dims[target.module]
        parts = grouped[target] = tuple(found[target][part] for part in PARTS[family])
        if family == "spectral":
            _check_entries(target, parts, min(dims))
            probes[target] = _checked_probe(target, found[target].get(PROBE))
        else:
            _check_shapes(target, family, parts, dims)
        g = found[target].get(ROW_SCALES)
        if g is not None:
            if tuple(g.shape) != (dims.d_out,):
                raise AdapterRejected(
                    f"{target}.{ROW_SCALES}", f"shape {list(g.shape)} must be [{dims.d_out}]"
                )
            row_scales[target] = g
    return grouped, row_scales, probes


def _target(name: str) -> Target | None:
    """The target of that name; its layer may be beyond those of the base."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in MODULES:
        return None
    return Target(int(match[1]), match[2])


def _check_shapes(target: Target, family: Family, parts: tuple[Tensor, ...], dims: Dims) -> None:
    rank = parts[0].shape[0] if parts[0].ndim == 2 else 0
    expected: dict[Family, list[tuple[int, int]]] = {
        "core": [(rank, rank)],
        "fold": [(rank, dims.d_out)],
        "lora": [(rank, dims.d_in), (dims.d_out, rank)],
    }
    for part, tensor, want in zip(PARTS[family], parts, expected[family], strict=True):
        if rank < 1 or tuple(tensor.shape) != want:
            raise AdapterRejected(
                f"{target}.{part}", f"shape {list(tensor.shape)} must be {list(want)}, rank ≥ 1"
            )


def _check_entries(target: Target, parts: tuple[Tensor, ...], size: int) -> None:
    """``rows``, ``columns`` and values of a sparse ``(size, size)`` matrix."""
    count = len(parts[0]) if parts[0].ndim else 0
    for part, tensor in zip(PARTS["spectral"], parts, strict=True):
        if count < 1 or tuple(tensor.shape) != (count,):
            raise AdapterRejected(
                f"{target}.{part}", f"shape {list(tensor.shape)} must be [{count}], entries ≥ 1"
            )
    for part, indices in zip(INDICES, parts[:2], strict=True):
        if int(indices.min()) < 0 or int(indices.max()) >= size:
            raise AdapterRejected(f"{target}.{part}", f"indices must be from 0 to {size - 1}")
    place = parts[0].long() * size + parts[1]
    if not bool((place[1:] > place[:-1]).all()):
        raise AdapterRejected(
            f"{target}.I", "entries must be sorted by row and column, each given once"
        )


def _checked_probe(target: Target, probe: Tensor | None) -> Tensor:
    if probe is None:
        raise AdapterRejected(f"{target}.{PROBE}", "is missing")
    if tuple(probe.shape) != PROBE_SHAPE:
        raise AdapterRejected(
            f"{target}.{PROBE}", f"shape {list(probe.shape)} must be {list(PROBE_SHAPE)}"
        )
    return probe


def _correction(config: Mapping[str, Any], family: Family, shape: BaseShape) -> Correction | None:
    if "correction" not in config:
        return None
    value, where = config["correction"], f"{_WHERE}: correction"
    if family != "lora":
        raise AdapterRejected(where, f"a {family} adapter has none")
    fields = {"method", "basis_id", "ranks", "scales"}
    if not isinstance(value, dict) or set(value) != fields:
        raise AdapterRejected(where, f"must hold {', '.join(sorted(fields))}")
    method, basis_id, given = value["method"], value["basis_id"], value["ranks"]
    if method not in CORRECTION_METHODS:
        raise AdapterRejected(where, f"method must be one of {', '.join(CORRECTION_METHODS)}")
    if not isinstance(basis_id, str):
        raise AdapterRejected(where, "basis_id must be a string")
    if not isinstance(given, dict) or not given:
        raise AdapterRejected(where, "ranks must name at least one target")
    ranks: dict[Target, int] = {}
    for name, rank in given.items():
        target = _target(name)
        if target is None or target.layer >= shape.num_layers:
            raise AdapterRejected(f"{where}: {printable(name)}", f"is not a target of {shape.name}")
        most = min(shape.dims[target.module])
        if type(rank) is not int or not 1 <= rank <= most:
            raise AdapterRejected(f"{where}: rank of {target}", f"must be from 1 to {most}")
        ranks[target] = rank
    ordered = sorted(ranks, key=lambda t: (t.layer, MODULES.index(t.module)))
    return Correction(
        method=method,
        basis_id=basis_id,
        ranks={target: ranks[target] for target in ordered},
        scales=_scales(value["scales"], dict.fromkeys(ordered), where),
    )


def _scales(value: Any, targets: Mapping[Target, object], where: str) -> dict[Target, float]:
    if not isinstance(value, dict) or set(value) != {str(target) for target in targets}:
        raise AdapterRejected(where, "scales must name exactly the adapted targets")
    scales = {}
    for target in targets:
        scale = finite_number(value[str(target)])
        if scale is None:
            raise AdapterRejected(f"{where}: scale of {target}", "must be a finite number")
        scales[target] = scale
    return scales
