"""Any number of different adapters out of one, without the libraries that would read it.

A variant has the low bytes of four numbers changed: to the server it is another adapter, with bytes
and a digest of its own, that does the same.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

WEIGHTS = "adapter_model.safetensors"
# Of what is changed. Other tensors may be compared with the base's: probes, shared factors.
OWN = "latent_mapping"
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
VARIANTS = 1 << 32


def variant(files: Mapping[str, bytes], number: int) -> dict[str, bytes]:
    """``files`` with number ``number`` of ``VARIANTS``.

    Args:
        files: those of an adapter's folder, by name.

    Raises:
        ValueError: the weights are no safetensors file with numbers to change.
    """
    data = files[WEIGHTS]
    at, step = _numbers(data)
    changed = bytearray(data)
    for index, byte in enumerate(struct.pack("<I", number % VARIANTS)):
        changed[at + index * step] = byte  # the lowest of its number: little-endian
    return {**files, WEIGHTS: bytes(changed)}


def _numbers(data: bytes) -> tuple[int, int]:
    """Where the first of four neighbouring numbers lies, and the bytes of each."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        header: dict[str, dict[str, Any]] = json.loads(data[8 : 8 + length])
        tensors = {name: each for name, each in header.items() if name != "__metadata__"}
        own = [each for name, each in tensors.items() if OWN in name] or list(tensors.values())
        for each in own:
            begin, end = each["data_offsets"]
            step = BYTES.get(each["dtype"])
            if step and end - begin >= 4 * step:
                return 8 + length + begin, step
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{WEIGHTS} is no safetensors file: {problem}") from problem
    raise ValueError(f"{WEIGHTS} has no tensor of four numbers or more")
