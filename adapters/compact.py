"""The compact form of a record: the same content in fewer bytes, for the store alone.

A record (``record.py``) is a safetensors file, whose header names every tensor twice: 25 KB beside
13 KB of values for a rank-4 LoRA-XS of a 30-layer base. The compact form keeps the values as they
are and says the rest once for each run of layers. ``expand`` gives back the record byte for byte,
so digests, which are of the record, do not know of this form, and records that were stored before
stay what they are.

::

    b"shoalrc1" · length of the manifest (u32, little-endian) · manifest · tensor bytes

The manifest is deflated JSON ``[config, scales, tensors]``: the record's metadata without its
scales, ``[value, module, layers]`` for equal scales, ``[module.part, dtype, shape, layers]`` for
equal tensors; ``layers`` is a list such as ``"0-11,14"``. Pure: imports no tensor library.
"""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

MAGIC = b"shoalrc1"  # as the length of a safetensors header it would be beyond every limit
MANIFEST_BYTES_MAX = 1 << 20  # inflated
LAYERS_MAX = 1 << 12  # of one entry
# A header that is less of the record than this is not worth another copy of the tensors.
WORTH = 1 / 32

_KINDS = 16
_LENGTH = struct.Struct("<I")
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+\.[A-Z])")
_TARGET = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+)")
_ITEM_BYTES = {"F32": 4, "I32": 4, "F16": 2, "BF16": 2}


def compact(record: bytes) -> bytes | None:
    """The compact form of ``record``; None where there is none, or it would gain nothing."""
    begin = 8 + int.from_bytes(record[:8], "little")
    if not len(record) * WORTH < begin <= len(record):
        return None
    manifest = _manifest_of(record[:begin])
    if manifest is None:
        return None
    length = _LENGTH.pack(len(manifest))
    return b"".join((MAGIC, length, manifest, memoryview(record)[begin:]))


def expand(data: bytes) -> bytes:
    """The record of which ``data`` is the compact form.

    Raises:
        ValueError: it is damaged. Not all damage is seen: compare the digest.
    """
    manifest, tensors = _split_up(data)
    return b"".join((_head_of(manifest), tensors))


def record_sha256(data: bytes) -> str:
    """The sha256 (hex) of what ``expand`` gives, in a third of the time.

    Raises:
        ValueError: as ``expand``.
    """
    manifest, tensors = _split_up(data)
    sha256 = _hashed_head_of(manifest).copy()
    sha256.update(tensors)
    return sha256.hexdigest()


def _split_up(data: bytes) -> tuple[bytes, memoryview]:
    start = len(MAGIC) + _LENGTH.size
    if len(data) < start or not data.startswith(MAGIC):
        raise ValueError("not a compact record")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    return data[start : start + length], memoryview(data)[start + length :]


# Adapters of one kind share their header, and JSON of 25 KB takes milliseconds.
@lru_cache(_KINDS)
def _manifest_of(head: bytes) -> bytes | None:
    try:
        manifest = _describe(json.loads(head[8:]))
        if _head(manifest) != head:
            return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not a record as `record.py` writes it
    return zlib.compress(json.dumps(manifest, separators=(",", ":")).encode(), 9)


@lru_cache(_KINDS)
def _head_of(manifest: bytes) -> bytes:
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(manifest, MANIFEST_BYTES_MAX)
        if not inflate.eof:
            raise ValueError("its manifest is cut off or too long")
        return _head(json.loads(text))
    except (
        ValueError,
        zlib.error,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"its manifest is damaged: {error}") from error


@lru_cache(_KINDS)
def _hashed_head_of(manifest: bytes) -> "hashlib._Hash":
    return hashlib.sha256(_head_of(manifest))


def _describe(header: dict[str, Any]) -> list[Any]:
    """The manifest of a safetensors header."""
    config = json.loads(header.pop("__metadata__")["shoal"])
    scales: dict[tuple[str, float], list[int]] = {}
    for target, scale in config.pop("scales").items():
        layer, module = _split(_TARGET, target)
        scales.setdefault((module, scale), []).append(layer)
    tensors: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for name, entry in header.items():
        layer, part = _split(_TENSOR, name)
        tensors.setdefault((part, entry["dtype"], tuple(entry["shape"])), []).append(layer)
    return [
        config,
        [[scale, module, _runs(layers)] for (module, scale), layers in scales.items()],
        [[*key, _runs(layers)] for key, layers in tensors.items()],
    ]


def _head(manifest: Any) -> bytes:
    """The safetensors header of a manifest, with its length and padding."""
    config, scales, tensors = manifest
    config["scales"] = {
        f"layers.{layer}.{module}": scale
        for scale, module, layers in scales
        for layer in _layers(layers)
    }
    found = {
        f"layers.{layer}.{part}": (dtype, shape)
        for part, dtype, shape, layers in tensors
        for layer in _layers(layers)
    }
    metadata = json.dumps(config, sort_keys=True, separators=(",", ":"))
    del config["scales"]
    header: dict[str, object] = {"__metadata__": {"shoal": metadata}}
    begin = 0
    for name in sorted(found, key=lambda name: (-_ITEM_BYTES[found[name][0]], name)):
        dtype, shape = found[name]
        end = begin + _ITEM_BYTES[dtype]
        for size in shape:
            end = begin + (end - begin) * size
        header[name] = {"data_offsets": [begin, end], "dtype": dtype, "shape": list(shape)}
        begin = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _split(pattern: re.Pattern[str], name: str) -> tuple[int, str]:
    match = pattern.fullmatch(name)
    if match is None:
        raise ValueError(name)
    return int(match[1]), match[2]


def _runs(layers: Iterable[int]) -> str:
    """``0-11,14`` for the layers 0 to 11 and 14."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _layers(runs: str) -> list[int]:
    layers: list[int] = []
    for run in runs.split(","):
        first, _, last = run.partition("-")
        span = range(int(first), int(last or first) + 1)
        if len(layers) + len(span) > LAYERS_MAX:
            raise ValueError(f"more than {LAYERS_MAX} layers")
        layers.extend(span)
    return layers
