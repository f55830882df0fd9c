"""What was asked (``ServeConfig``) and what was derived from it and the device (``EnginePlan``).

Both are frozen. Defaults, help, validation and command-line flags have one definition: the fields
of ``ServeConfig``. Pure: the device's facts are passed in, nothing here looks at one.
"""

import argparse
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")},
    **{letter: 1024 ** (i + 1) for i, letter in enumerate("kmgt")},
}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_MAX_PORT = 65535
# The device bank has room for these many LoRA-XS adapters (rank 16, every module) where it can.
ADAPTERS_WANTED = 100_000
# xformers' paged kernel reads this many tokens at a time.
_XFORMERS_BLOCK = 64
_GIB = 1 << 30
_HELPERS_MAX, _CORES_A_HELPER = 8, 3  # of uploads; cores for each
_API_WORKERS_MAX, _CORES_AN_API_WORKER = 4, 4  # HTTP processes; cores for each


def parse_bytes(text: str) -> int:
    """A byte count from ``"4GiB"``, ``"500 MB"``, ``"64M"`` (binary) or ``"1024"``.

    Raises:
        ValueError: not a number with a known unit.
    """
    match = _BYTES.fullmatch(text.strip())
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write a number of bytes, or such as 64MiB, 4GiB")
    return int(float(match.group(1)) * _UNITS[unit])


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] = str,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field that also describes its command-line flag."""
    metadata = {"help": help, "parse": parse, "choices": choices, "metavar": metavar}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that can be asked of ``shoal serve``.

    ``None`` means: derived from the model or the device (see ``plan_engine``).

    Raises:
        ValueError: a field breaks its rule; the message names the flag, the value and the rule.
    """

    model: str = option("smollm2", "Hugging Face directory, .gguf file, or the alias smollm2")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free one and prints it", parse=int)
    api_key: tuple[str, ...] = option(
        (), "key that clients must send as a Bearer token; repeatable", metavar="KEY", secret=True
    )
    served_model_name: str | None = option(
        None, "the base's name in the API; default: derived from MODEL", metavar="NAME"
    )
    max_model_len: int | None = option(
        None, "longest prompt + answer in tokens; default: the model's own", parse=int
    )
    max_num_seqs: int = option(256, "rows in one step at most", parse=int)
    max_num_batched_tokens: int = option(2048, "tokens in one step at most", parse=int)
    max_waiting: int = option(
        4096, "requests that may wait; beyond it the answer is 429", parse=int
    )
    max_waiting_per_tenant: int | None = option(
        None, "requests of one tenant that may wait; default: as --max-waiting", parse=int
    )
    max_wait: float | None = option(
        None,
        "seconds: a request that would wait longer is answered 429 at once; default: no limit",
        parse=float,
        metavar="SECONDS",
    )
    dtype: str = option(
        "auto",
        "auto: float32 on a CPU, the checkpoint's 16-bit type on CUDA",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    attention: str = option(
        "auto", "attention backend", choices=("auto", "triton", "xformers", "torch")
    )
    load_format: str = option(
        "auto", "dummy: random weights, for benchmarks", choices=("auto", "dummy")
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the device's memory to use, weights included", parse=float
    )
    block_size: int = option(16, "tokens per KV block; a power of two", parse=int)
    kv_cache_memory: int | None = option(
        None, "bytes of KV cache; default: what is left on CUDA, 1GiB on a CPU", parse=parse_bytes
    )
    adapter_memory: int | None = option(
        None,
        f"bytes of the device adapter bank; default: room for {ADAPTERS_WANTED:,} LoRA-XS adapters"
        " of rank 16, at most a quarter of what is left, on CUDA, 512MiB on a CPU",
        parse=parse_bytes,
    )
    host_adapter_memory: int = option(
        2 << 30, "bytes of adapters kept ready in host memory", parse=parse_bytes
    )
    spectral_memory: int | None = option(
        None,
        "bytes on the device for the base's singular vectors, twice a weight for each that SVF and"
        " SVFT adapters change; default: 0, which refuses them, on CUDA, 1GiB on a CPU",
        parse=parse_bytes,
    )
    tensor_parallel_size: int = option(1, "devices to split the model over; only 1", parse=int)
    api_workers: int | None = option(
        None,
        "processes that speak HTTP beside the engine's; 0: the engine's own does; default: 0 on a"
        " CPU, on CUDA one for each 4 cores, 1 to 4",
        parse=int,
        metavar="N",
    )
    registry: str | None = option(
        None,
        "SQLAlchemy URL of the adapter catalog; default: registry.db in the user data folder",
        metavar="URL",
    )
    store: str | None = option(
        None,
        "fsspec URL of the adapters' bytes; default: beside a SQLite registry",
        metavar="URL",
    )
    basis_rank: int = option(64, "rank of the shared LoRA-XS basis", parse=int)
    shipped_adapters: bool = option(True, "offer the adapters shipped with the repository")
    lora_root: str | None = option(
        None,
        "folder that /v1/load_lora_adapter may read from; without it that route is refused",
        metavar="DIR",
    )
    max_upload_bytes: int = option(
        1 << 30, "size of one adapter upload at most", parse=parse_bytes, metavar="BYTES"
    )
    upload_helpers: int | None = option(
        None,
        "processes that read small uploads beside the server, started with the first, on CUDA with "
        "the server; default: one for each 3 cores, 1 to 8; 0: none",
        parse=int,
        metavar="N",
    )
    max_body_bytes: int = option(
        8 << 20, "size of a JSON request body at most", parse=parse_bytes, metavar="BYTES"
    )
    shutdown_timeout: float = option(
        30.0, "seconds that running requests get to end after SIGTERM", parse=float
    )
    log_level: str = option(
        "info", "how much to log", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            choices = spec.metadata["choices"]
            if choices is not None:
                value = getattr(self, spec.name)
                self._require(spec.name, value in choices, f"one of {', '.join(choices)}")
        self._require("port", 0 <= self.port <= _MAX_PORT, f"from 0 to {_MAX_PORT}")
        for name in _POSITIVE:
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        self._require("spectral_memory", (self.spectral_memory or 0) >= 0, "at least 0")
        self._require("model", bool(self.model), "not empty")
        self._require("host", bool(self.host), "not empty")
        self._require("api_key", all(self.api_key), "not empty", shown="''")
        self._require("served_model_name", self.served_model_name != "", "not empty")
        self._require(
            "gpu_memory_utilization",
            0.0 < self.gpu_memory_utilization <= 1.0,
            "above 0 and at most 1",
        )
        self._require(
            "max_num_batched_tokens",
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"at least --max-num-seqs ({self.max_num_seqs}), so that every row advances",
        )
        self._require("block_size", self.block_size.bit_count() == 1, "a power of two")
        self._require(
            "block_size",
            self.attention != "xformers" or self.block_size % _XFORMERS_BLOCK == 0,
            f"a multiple of {_XFORMERS_BLOCK} with --attention xformers",
        )
        self._require("max_wait", self.max_wait is None or self.max_wait > 0, "above 0")
        if self.upload_helpers is not None:
            self._require("upload_helpers", 0 <= self.upload_helpers <= 64, "0 to 64")
        self._require("shutdown_timeout", 0 <= self.shutdown_timeout < 86400, "0 to 86400 seconds")
        self._require(
            "tensor_parallel_size",
            self.tensor_parallel_size == 1,
            "1: this version runs on one device",
        )
        if self.api_workers is not None:
            self._require("api_workers", 0 <= self.api_workers <= 64, "0 to 64")

    def _require(self, name: str, holds: bool, rule: str, shown: str | None = None) -> None:
        if not holds:
            value = repr(getattr(self, name)) if shown is None else shown
            raise ValueError(f"{_flag(name)} is {value}: must be {rule}")

    def spectral_bytes(self, device: str) -> int:
        """``spectral_memory`` on a device: ``cpu`` or ``cuda``."""
        if self.spectral_memory is not None:
            return self.spectral_memory
        return _GIB if device == "cpu" else 0

    def upload_processes(self, cores: int | None = None) -> int:
        """``upload_helpers`` on a machine of so many cores, by default this one."""
        if self.upload_helpers is not None:
            return self.upload_helpers
        return max(1, min(_HELPERS_MAX, (cores or os.cpu_count() or 1) // _CORES_A_HELPER))

    def http_processes(self, device: str, cores: int | None = None) -> int:
        """``api_workers`` on a device, ``cpu`` or ``cuda``, and a machine of so many cores."""
        if self.api_workers is not None:
            return self.api_workers
        if device == "cpu":  # whose cores the engine takes
            return 0
        cores = cores or os.cpu_count() or 1
        return max(1, min(_API_WORKERS_MAX, cores // _CORES_AN_API_WORKER))

    @property
    def base_name(self) -> str:
        """The base's name in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        return Path(self.model.rstrip("/")).name.removesuffix(".gguf")

    @property
    def registry_url(self) -> str:
        """SQLAlchemy URL of the catalog."""
        if self.registry is not None:
            return self.registry
        return f"sqlite:///{platformdirs.user_data_path('shoal') / 'registry.db'}"


_POSITIVE = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_waiting",
    "max_waiting_per_tenant",
    "kv_cache_memory",
    "adapter_memory",
    "host_adapter_memory",
    "basis_rank",
    "max_upload_bytes",
    "max_body_bytes",
)


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def _shown(value: Any, parse: Callable[[str], Any]) -> str:
    """A default as a reader would write it."""
    if parse is not parse_bytes:
        return str(value)
    for exponent, letter in reversed(list(enumerate("KMGT", start=1))):
        if value and value % 1024**exponent == 0:
            return f"{value // 1024**exponent}{letter}iB"
    return str(value)


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    only: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Give ``parser`` one argument for each field of ``ServeConfig``.

    Args:
        only: these fields; by default all.
        defaults: others than the fields' own.
    """
    for spec in fields(ServeConfig):
        if only is not None and spec.name not in only:
            continue
        meta, default = spec.metadata, (defaults or {}).get(spec.name, spec.default)
        no_default = default is None or default == ()
        note = "" if no_default else f" (default: {_shown(default, meta['parse'])})"
        text = (meta["help"] + note).replace("%", "%%")
        if spec.name == "model":
            parser.add_argument("model", nargs="?", default=default, metavar="MODEL", help=text)
        elif isinstance(default, bool):
            parser.add_argument(
                _flag(spec.name), action=argparse.BooleanOptionalAction, default=default, help=text
            )
        elif isinstance(default, tuple):
            parser.add_argument(
                _flag(spec.name),
                action="append",
                default=[],
                metavar=meta["metavar"],
                help=text,
            )
        else:
            parser.add_argument(
                _flag(spec.name),
                type=_argument_type(meta["parse"]),
                default=default,
                choices=meta["choices"],
                metavar=meta["metavar"] if meta["choices"] is None else None,
                help=text,
            )


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """``parse``, with its own message kept: argparse shows only ``ArgumentTypeError``'s."""
    if parse is not parse_bytes:
        return parse

    def convert(text: str) -> int:
        try:
            return parse_bytes(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def from_args(namespace: argparse.Namespace) -> ServeConfig:
    """The configuration that the command line asked for.

    Raises:
        ValueError: as ``ServeConfig``.
    """
    values = {spec.name: getattr(namespace, spec.name) for spec in fields(ServeConfig)}
    values["api_key"] = tuple(values["api_key"])
    return ServeConfig(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the plan needs to know of the model.

    Attributes:
        kv_elements_per_token: keys and values of one token over all layers, in elements.
        max_model_len: positions that the model can address.
        checkpoint_dtype: ``float32``, ``float16`` or ``bfloat16``.
        adapter_elements: of a LoRA-XS adapter of rank 16 on every module, in the device bank.
        unit_elements: what the bank hands out; it cannot have less.
    """

    kv_elements_per_token: int
    max_model_len: int
    checkpoint_dtype: str
    adapter_elements: int = 0
    unit_elements: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """The device's memory in bytes, looked at after the weights were loaded.

    ``reserve_bytes`` is what serving takes beside weights, adapters and cache (``reserve.py``).
    """

    total_bytes: int
    free_bytes: int
    reserve_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What the engine was given: derived once, logged at start, never written to."""

    device: str
    dtype: str
    block_tokens: int
    num_blocks: int
    max_model_len: int
    arena_bytes: int


def resolve_dtype(asked: str, *, device: str, checkpoint_dtype: str) -> str:
    """The dtype to serve in. ``auto``: float32 on a CPU, the checkpoint's 16-bit type on CUDA."""
    if asked != "auto":
        return asked
    if device == "cpu":
        return "float32"
    return "float16" if checkpoint_dtype == "float16" else "bfloat16"


def plan_engine(
    config: ServeConfig, *, device: str, model: ModelFacts, memory: MemoryFacts
) -> EnginePlan:
    """Divide the device's memory.

    Args:
        device: ``cpu`` or ``cuda``; already resolved.

    Raises:
        ValueError: the memory does not hold what was asked, the adapters or one request of the
            longest length, or ``--max-model-len`` exceeds the model's.
    """
    dtype = resolve_dtype(config.dtype, device=device, checkpoint_dtype=model.checkpoint_dtype)
    length = config.max_model_len or model.max_model_len
    if length > model.max_model_len:
        raise ValueError(
            f"--max-model-len is {length}: must be at most {model.max_model_len}, what the model"
            " was made for"
        )
    on_cpu = device == "cpu"
    item = _DTYPE_BYTES[dtype]
    unit_bytes = model.unit_elements * item
    if config.adapter_memory is not None and config.adapter_memory < unit_bytes:
        raise ValueError(
            f"--adapter-memory is {config.adapter_memory}: must be at least {unit_bytes} bytes,"
            " the least that an adapter takes"
        )
    if on_cpu:
        arena_bytes = config.adapter_memory or 512 << 20
        kv_bytes = config.kv_cache_memory or 1 << 30
    else:
        arena_bytes, kv_bytes = _divide(config, memory, model.adapter_elements * item, unit_bytes)
    block_bytes = model.kv_elements_per_token * item * config.block_size
    num_blocks = kv_bytes // block_bytes
    if config.max_model_len is None and config.kv_cache_memory is None and on_cpu:
        # A CPU's default cache serves the length that fits, rather than refusing to start.
        length = min(length, max(num_blocks, 0) * config.block_size)
    needed = -(-length // config.block_size)
    if num_blocks < needed or length < 1:
        raise ValueError(
            f"the KV cache would have {max(num_blocks, 0)} blocks of {config.block_size} tokens"
            f" ({max(kv_bytes, 0)} bytes): one request of {length} tokens needs {max(needed, 1)};"
            " lower --max-model-len or --adapter-memory, or raise --kv-cache-memory or"
            " --gpu-memory-utilization"
        )
    return EnginePlan(
        device=device,
        dtype=dtype,
        block_tokens=config.block_size,
        num_blocks=num_blocks,
        max_model_len=length,
        arena_bytes=arena_bytes,
    )


def _divide(
    config: ServeConfig, memory: MemoryFacts, adapter_bytes: int, unit_bytes: int
) -> tuple[int, int]:
    """Bytes of the adapter bank and of the KV cache on a GPU.

    Sizes that were given are kept as long as the card has them; the others share what
    ``--gpu-memory-utilization`` leaves.

    Raises:
        ValueError: they do not fit.
    """
    used = memory.total_bytes - memory.free_bytes
    free = memory.free_bytes - memory.reserve_bytes
    allowed = int(memory.total_bytes * config.gpu_memory_utilization)
    left = min(allowed - used - memory.reserve_bytes, free)
    if left < unit_bytes and None in (config.adapter_memory, config.kv_cache_memory):
        raise ValueError(
            f"--gpu-memory-utilization is {config.gpu_memory_utilization}: that leaves 0 blocks of"
            f" KV cache, {_gib(allowed)} of the card's {_gib(memory.total_bytes)}, of which"
            f" {_gib(used)} are taken and a step needs {_gib(memory.reserve_bytes)}; raise it, or"
            " lower --max-num-batched-tokens or --max-num-seqs"
        )
    arena, kv = config.adapter_memory, config.kv_cache_memory
    if arena is None:
        most = left // 4 if kv is None else min(left // 4, left - kv)
        arena = max(min(adapter_bytes * ADAPTERS_WANTED, most), unit_bytes)
    if kv is None:
        kv = left - arena
        if kv <= 0:
            raise ValueError(
                f"--adapter-memory is {_gib(arena)}: must be less than {_gib(left)}, what"
                f" --gpu-memory-utilization {config.gpu_memory_utilization} leaves for adapters and"
                " KV cache"
            )
    if arena + kv > max(free, 0):
        raise ValueError(
            f"--adapter-memory ({_gib(arena)}) and --kv-cache-memory ({_gib(kv)}) together must be"
            f" at most {_gib(max(free, 0))}: {_gib(memory.free_bytes)} are free, and a step needs"
            f" {_gib(memory.reserve_bytes)}"
        )
    return arena, kv


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
