"""Identity of a base model's weights on disk.

Owns `base_digest` and its cache. It does not read tensors: two files with the same weights in
another layout are two bases here, and a basis' probes decide whether an adapter fits both.
"""

import hashlib
import json
import logging
from pathlib import Path

from platformdirs import user_cache_path

from shoal.adapters.formats.container import write_atomically

log = logging.getLogger(__name__)


def base_digest(path: Path) -> str:
    """The sha256 (hex) that identifies a base model's files.

    Args:
        path: a ``.gguf`` file (digest of its bytes), or a Hugging Face directory: digest of one
            line ``<sha256>  <name>\\n`` each for ``config.json`` and then every
            ``*.safetensors``, sorted by name.

    Raises:
        FileNotFoundError: no such file, or a directory without ``config.json`` or weights.

    Cost: reads every byte once; afterwards a small file in the user's cache folder answers for as
    long as path, sizes and modification times stay the same.
    """
    path = path.resolve()
    files = _files(path)
    stamp = [
        [file.name, status.st_size, status.st_mtime_ns]
        for file, status in ((file, file.stat()) for file in files)
    ]
    key = hashlib.sha256(str(path).encode()).hexdigest()
    cache = user_cache_path("shoal") / "base-digests" / f"{key}.json"
    cached = _cached(cache, stamp)
    if cached is not None:
        return cached
    digests = [_sha256(file) for file in files]
    if path.is_dir():
        lines = "".join(f"{d}  {f.name}\n" for d, f in zip(digests, files, strict=True))
        digest = hashlib.sha256(lines.encode()).hexdigest()
    else:
        digest = digests[0]
    try:
        write_atomically(cache, [json.dumps({"stamp": stamp, "digest": digest}).encode()])
    except OSError as error:  # a read-only home costs time at the next start, nothing else
        log.warning("base digest not cached: %s", error)
    return digest


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    weights = sorted(path.glob("*.safetensors"), key=lambda file: file.name)
    config = path / "config.json"
    if not config.is_file() or not weights:
        raise FileNotFoundError(f"{path}: must hold config.json and *.safetensors")
    return [config, *weights]


def _cached(cache: Path, stamp: list[list[object]]) -> str | None:
    try:
        found = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("stamp") != stamp:
        return None
    digest = found.get("digest")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
