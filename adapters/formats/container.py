"""Reading and writing safetensors and JSON that come from strangers.

Owns the byte level: limits, header validation, dtypes, deterministic output, atomic files. It does
not know what a tensor means. Whatever the bytes are, reading them gives tensors or an
:class:`AdapterError` that names the file, tensor or field; never another exception, and never an
allocation beyond the stated limits.

The `safetensors` package is not used for reading because its errors name no tensor, and not for
writing because its metadata order is not fixed, while an adapter's digest needs one byte sequence
for one content.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge

# A header entry takes about 150 bytes: 400 KB for all targets of a 126-layer model with 3 tensors
# each. 4 MiB leaves room and keeps the parsed form below ~100 MB.
HEADER_BYTES_MAX = 4 << 20
JSON_BYTES_MAX = 1 << 20
JSON_DEPTH_MAX = 32
SHAPE_DIMS_MAX = 8
# Small tensors are read and looked at this many bytes at a time.
RUN_BYTES = 1 << 20
NAME_CHARS_MAX = 200

DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of indices. A format says which of its tensors may hold them.
INTEGER_DTYPES: Mapping[str, torch.dtype] = {"I32": torch.int32}
_ALL_DTYPES = {**DTYPES, **INTEGER_DTYPES}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_DTYPE_NAMES = {dtype: name for name, dtype in _ALL_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: ``begin``/``end`` are byte offsets after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def printable(name: str) -> str:
    """``name`` fit for an error message: short, and without control or unpaired characters."""
    if len(name) > NAME_CHARS_MAX:
        name = name[:NAME_CHARS_MAX] + "…"
    if name.isprintable():  # nearly always, and this runs for every tensor of every upload
        return name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


# ---------------------------------------------------------------------------------------- JSON


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Args:
        data: the bytes; the caller has bounded their length.
        where: the file or part to name in errors.

    Raises:
        AdapterRejected: not UTF-8, not JSON, not an object, a key given twice, NaN or Infinity, or
            nested deeper than ``JSON_DEPTH_MAX``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise AdapterRejected(f"{where}: {printable(key)}", "the key is given twice")
            found[key] = value
        return found

    def constant(text: str) -> float:
        raise AdapterRejected(where, f"{text} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise AdapterRejected(where, f"must be a JSON object in UTF-8 ({error})") from error
    except RecursionError as error:
        raise AdapterRejected(where, f"must be nested at most {JSON_DEPTH_MAX} deep") from error
    if not isinstance(value, dict):
        raise AdapterRejected(where, f"must be a JSON object, not {type(value).__name__}")
    _check_depth(value, where)
    return value


def _check_depth(value: dict[str, Any], where: str) -> None:
    """Refuse nesting that later code, or a JSON answer that quotes it, could choke on."""
    level: list[dict[str, object] | list[object]] = [value]
    for _ in range(JSON_DEPTH_MAX):
        inner: list[dict[str, object] | list[object]] = []
        for item in level:
            values = item.values() if isinstance(item, dict) else item
            inner += [each for each in values if isinstance(each, dict | list)]
        if not inner:
            return
        level = inner
    raise AdapterRejected(where, f"must be nested at most {JSON_DEPTH_MAX} deep")


def finite_number(value: object) -> float | None:
    """``value`` as a float when it is a JSON number that is finite as one, else None."""
    if type(value) is not int and type(value) is not float:
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of a float
        return None
    return number if math.isfinite(number) else None


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Read a JSON object from a file of at most ``JSON_BYTES_MAX`` bytes; see `parse_json`."""
    with path.open("rb") as file:
        data = file.read(JSON_BYTES_MAX + 1)
    if len(data) > JSON_BYTES_MAX:
        raise AdapterTooLarge(f"{where}: is larger than the limit of {JSON_BYTES_MAX} bytes")
    return parse_json(data, where)


# -------------------------------------------------------------------------------------- reading


def read_tensors(
    file: BinaryIO, size: int, where: str, *, empty: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole safetensors file.

    Args:
        file: positioned at its start.
        size: its length in bytes; at most this much memory is used for tensors.
        where: the file to name in errors.
        empty: whether sizes of zero are accepted.

    Returns:
        Tensors on the CPU, small neighbours in common memory, and the metadata.

    Raises:
        AdapterRejected: truncated, a header that is too long or contradicts itself, an unknown
            dtype, overlapping or missing bytes, NaN or Inf. Names the tensor.
    """
    header, data_start = read_header(file, size, where)
    entries, metadata = parse_header(header, size - data_start, where, empty=empty)
    tensors: dict[str, Tensor] = {}
    for run in _runs(sorted(entries.items(), key=lambda item: item[1].begin)):
        tensors |= _read_run(file, run, where)
    return tensors, metadata


def _runs(entries: Sequence[tuple[str, Entry]]) -> Iterator[list[tuple[str, Entry]]]:
    """Neighbours of one dtype, ``RUN_BYTES`` of them at most or a single larger one."""
    run: list[tuple[str, Entry]] = []
    for name, entry in entries:
        first = run[0][1] if run else entry
        if run and (entry.dtype != first.dtype or entry.end - first.begin > RUN_BYTES):
            yield run
            run = []
        run.append((name, entry))
    if run:
        yield run


def _read_run(file: BinaryIO, run: Sequence[tuple[str, Entry]], where: str) -> dict[str, Tensor]:
    """The tensors of a run; they share its memory."""
    start, dtype = run[0][1].begin, run[0][1].dtype
    raw = torch.empty(run[-1][1].end - start, dtype=torch.uint8)
    found = file.readinto(raw.numpy().data) if len(raw) else 0  # type: ignore[attr-defined]
    if found != len(raw):
        name = next(name for name, entry in run if entry.end - start > found)
        raise AdapterRejected(printable(name), f"{where} ends inside this tensor")
    whole = raw.view(dtype)
    finite = bool(torch.isfinite(whole).all())
    size = dtype.itemsize
    tensors = {}
    for name, entry in run:
        part = whole[(entry.begin - start) // size : (entry.end - start) // size]
        if not finite and not bool(torch.isfinite(part).all()):
            raise AdapterRejected(printable(name), "every value must be finite; found NaN or Inf")
        tensors[name] = part.view(entry.shape)
    return tensors


def read_header(file: BinaryIO, size: int, where: str) -> tuple[bytes, int]:
    """Read the header of a safetensors file; returns it and the offset of the tensor bytes."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise AdapterRejected(where, f"is no safetensors file: {len(prefix)} bytes long")
    length = int.from_bytes(prefix, "little")
    if length > HEADER_BYTES_MAX:
        raise AdapterRejected(
            where,
            f"is no safetensors file, or its header is too long: "
            f"{length} bytes, limit {HEADER_BYTES_MAX}",
        )
    header = file.read(length)
    if len(header) < length or size < 8 + length:
        raise AdapterRejected(where, f"is truncated: its header should be {length} bytes long")
    return header, 8 + length


def parse_header(
    header: bytes, data_bytes: int, where: str, *, empty: bool = False
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Validate a safetensors header against the number of tensor bytes that follow it."""
    parsed = parse_json(header, f"{where} header")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterRejected(f"{where}: __metadata__", "must map strings to strings")
    entries = {name: _parse_entry(name, value, empty) for name, value in parsed.items()}
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != expected:
            what = "overlaps another tensor" if entry.begin < expected else "leaves unused bytes"
            raise AdapterRejected(
                printable(name), f"data_offsets: {what}; must start at {expected}"
            )
        expected = entry.end
        if expected > data_bytes:
            raise AdapterRejected(
                printable(name),
                f"{where} is truncated: the tensor ends at byte {expected} of {data_bytes}",
            )
    if expected != data_bytes:
        raise AdapterRejected(where, f"has {data_bytes - expected} bytes that belong to no tensor")
    return entries, metadata


def _parse_entry(name: str, value: object, empty: bool) -> Entry:
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        raise AdapterRejected(
            printable(name), "its header entry must hold dtype, shape and data_offsets"
        )
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _ALL_DTYPES:
        raise AdapterRejected(
            printable(name),
            f"dtype {printable(str(dtype_name))} must be one of {', '.join(DTYPES)}",
        )
    dtype = _ALL_DTYPES[dtype_name]
    if not _is_sizes(shape) or len(shape) > SHAPE_DIMS_MAX or (0 in shape and not empty):
        raise AdapterRejected(
            printable(name), f"shape must be at most {SHAPE_DIMS_MAX} sizes above zero"
        )
    # Beside a zero, no bytes bound the other sizes, and torch multiplies them for its strides.
    if 0 in shape and math.prod(filter(None, shape)) > 1 << 48:
        raise AdapterRejected(printable(name), "shape must be of at most 2^48 in all beside a zero")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise AdapterRejected(printable(name), "data_offsets must be two byte offsets")
    num_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise AdapterRejected(
            printable(name),
            f"data_offsets span {offsets[1] - offsets[0]} bytes; "
            f"{dtype_name} {list(shape)} takes {num_bytes}",
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _is_sizes(value: object) -> bool:
    # 2^48 keeps every product of sizes small enough for torch and for an error message.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 48 for item in value
    )


# -------------------------------------------------------------------------------------- writing


def tensor_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, the same for the same content.

    Args:
        tensors: float32, float16, bfloat16 or int32; any device and strides.
        metadata: written with sorted keys.

    Yields:
        The header, then each tensor's bytes: larger item sizes first (so that each is aligned),
        then by name. At most one tensor is copied at a time.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = tensors[name].detach().contiguous().cpu().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file so that, whatever happens, it is wholly there or not at all; durable after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes it private; adapters and bases are ordinary files.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
