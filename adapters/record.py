"""The canonical record: one byte sequence for one adapter, whatever file it came from.

Owns the form in which the registry stores an adapter and the digest that identifies its content.
It is a safetensors file: tensors ``layers.<layer>.<module>.<part>`` (part ``R``, ``D``, ``A`` or
``B``) in a fixed order, and everything else as JSON with sorted keys under the metadata key
``shoal``. It does not know upload formats, names or versions.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.container import (
    JSON_BYTES_MAX,
    finite_number,
    parse_json,
    printable,
    read_tensors,
    tensor_chunks,
)
from shoal.adapters.spec import MODULES, BaseShape, Dims, Family, Target
from shoal.adapters.weights import AdapterWeights

VERSION = 1
PARTS: Mapping[Family, tuple[str, ...]] = {"core": ("R",), "fold": ("D",), "lora": ("A", "B")}

_WHERE = "record"
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.([A-Z])")


def to_record(weights: AdapterWeights) -> bytes:
    """The record of ``weights``: equal bytes if and only if the adapters are equal."""
    tensors = {
        f"{target}.{part}": tensor
        for target, parts in weights.tensors.items()
        for part, tensor in zip(PARTS[weights.family], parts, strict=True)
    }
    config = {
        "version": VERSION,
        "format": weights.format,
        "family": weights.family,
        "basis_id": weights.basis_id,
        "scales": {str(target): float(weights.scales[target]) for target in weights.tensors},
    }
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return b"".join(tensor_chunks(tensors, {"shoal": text}))


def record_digest(data: bytes) -> str:
    """What identifies an adapter's content: sha256 (hex) of its record."""
    return hashlib.sha256(data).hexdigest()


def from_record(data: bytes, shape: BaseShape) -> AdapterWeights:
    """Read a record back and check it against the base.

    Raises:
        AdapterRejected: damaged, of another version, or made for a base of another shape.
    """
    tensors, metadata = read_tensors(io.BytesIO(data), len(data), _WHERE)
    # An unpaired surrogate passes here and is refused as bad UTF-8 below.
    text = metadata.get("shoal", "").encode(errors="surrogatepass")
    if len(text) > JSON_BYTES_MAX:
        raise AdapterRejected(_WHERE, f"its metadata exceeds {JSON_BYTES_MAX} bytes")
    config = parse_json(text, f"{_WHERE} metadata")
    if config.get("version") != VERSION:
        raise AdapterRejected(_WHERE, f"version {config.get('version')!r} must be {VERSION}")
    name, family, basis_id = (config.get(key) for key in ("format", "family", "basis_id"))
    if not isinstance(name, str) or not isinstance(family, str) or family not in PARTS:
        raise AdapterRejected(_WHERE, f"family must be one of {', '.join(PARTS)}")
    if (family == "core") != isinstance(basis_id, str):
        raise AdapterRejected(_WHERE, "basis_id must be given for core, and only for it")
    family = cast(Family, family)
    grouped = _group(tensors, family, shape)
    scales = _scales(config.get("scales"), grouped)
    return AdapterWeights(name, family, grouped, scales, basis_id)


def _group(
    tensors: Mapping[str, Tensor], family: Family, shape: BaseShape
) -> dict[Target, tuple[Tensor, ...]]:
    found: dict[Target, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[2] not in MODULES or match[3] not in PARTS[family]:
            raise AdapterRejected(printable(name), f"is not a tensor of a {family} record")
        target = Target(int(match[1]), match[2])
        if target.layer >= shape.num_layers:
            raise AdapterRejected(name, f"{shape.name} has layers 0 to {shape.num_layers - 1}")
        found.setdefault(target, {})[match[3]] = tensor
    if not found:
        raise AdapterRejected(_WHERE, "holds no tensors")
    grouped = {}
    for target in sorted(found, key=lambda t: (t.layer, MODULES.index(t.module))):
        missing = [part for part in PARTS[family] if part not in found[target]]
        if missing:
            raise AdapterRejected(f"{target}.{missing[0]}", "is missing")
        grouped[target] = tuple(found[target][part] for part in PARTS[family])
        _check_shapes(target, family, grouped[target], shape.dims[target.module])
    return grouped


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


def _scales(value: object, targets: Mapping[Target, object]) -> dict[Target, float]:
    if not isinstance(value, dict) or set(value) != {str(target) for target in targets}:
        raise AdapterRejected(_WHERE, "scales must name exactly the adapted targets")
    scales = {}
    for target in targets:
        scale = finite_number(value[str(target)])
        if scale is None:
            raise AdapterRejected(f"{_WHERE}: scale of {target}", "must be a finite number")
        scales[target] = scale
    return scales
