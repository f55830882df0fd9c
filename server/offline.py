"""An engine without a server: a named model shape, random weights, random resident adapters.

For benchmarks. The scheduler, the runners, the bank and the kernels are the ones that serve; only
what they work on is made up, on the device, in seconds. It owns making these parts and knowing
whether they fit; what is run and reported is the caller's (``shoal.loadtests``).
"""

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families import core, fold, lora
from shoal.adapters.families.joint_basis import CANONICAL_COLUMNS
from shoal.adapters.families.joint_basis import COLUMNS as JOINT_COLUMNS
from shoal.adapters.host_tier import HostTier
from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import GROUPS, UNIT_ELEMENTS, AdapterSpec, BaseShape
from shoal.adapters.tables import ActiveFamilies
from shoal.server.engine.plan import Runner
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.model.config import ModelConfig
from shoal.server.model.device_runner import RunnerLimits
from shoal.server.model.dummy import DummyFamily, adapter_std, random_decoder
from shoal.server.model.fused import defers_norms
from shoal.server.model.gemms import SPARE_ROWS
from shoal.server.model.graphs import NO_FAMILIES
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.runner import ModelRunner
from shoal.server.model.sampler import Sampler
from shoal.server.model.shapes import SHAPES
from shoal.server.model.starting import make_device_runner, measure_gemms

BASIS_ID = "random"
GIB = 1 << 30
# Tokens that a request may have; what a server with room for a few hundred of them would say.
MODEL_LEN = 8192
# For uploads on their way; several of the largest records.
HOST_TIER_BYTES = GIB
# Graphs, and the libraries' own.
WORKSPACE_BYTES = 2 * GIB


class DoesNotFit(ValueError):
    """What was asked needs more memory than the device has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineConfig:
    """What to build.

    Attributes:
        model_shape: a key of ``SHAPES``.
        fused: run the fused forward with its graphs and lookahead, as on CUDA; by default there.
        resident: adapters in the bank; 0 makes only the base.
        spare: further adapters that the bank has room for.
        max_num_seqs, max_num_batched_tokens: as of ``shoal serve``.
        workloads: how many sequences of how many tokens; the KV cache can hold any one of these.
    """

    model_shape: str
    device: str = "auto"
    dtype: str = "auto"
    fused: bool | None = None
    family: DummyFamily = "core"
    rank: int = 16
    resident: int = 0
    spare: int = 0
    basis_rank: int = 64
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_tokens: int = 16
    workloads: tuple[tuple[int, int], ...] = ((256, 256),)
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(tokens for _, tokens in self.workloads)


class OfflineEngine:
    """One model on one device, with an engine that has adapters and one that has none.

    Both share the weights and the KV cache, and take turns. The base's has no bank and no widened
    GEMM: it is an engine that was started without adapters.

    Attributes:
        runner, base_runner: of either engine; the same one without resident adapters.
        adapters: the residents; uploads are not among them.
        slots: where they are.
        host: the host tier of the engine with adapters.
        seconds: what making each part took, by name.
    """

    def __init__(self, config: OfflineConfig) -> None:
        """Make everything, after checking that it fits.

        Raises:
            DoesNotFit: more memory is needed than there is.
            ValueError: an argument is out of range for the model; the message says which.
        """
        self.config = config
        self.device = _device(config.device)
        self.model = ModelConfig.from_hf(SHAPES[config.model_shape])
        self.dtype = _dtype(config.dtype, self.device, self.model)
        self.shape = self.model.base_shape(config.model_shape, "0" * 64)
        self._fused = self.device.type == "cuda" if config.fused is None else config.fused
        self._check()
        self._model_len = min(self.model.max_model_len, max(MODEL_LEN, config.longest))
        self._num_blocks = _num_blocks(config)
        self._check_memory()
        self.seconds: dict[str, float] = {}
        with self._timed("weights"):
            self.decoder = random_decoder(
                self.model, self.device, self.dtype, config.seed, spare_rows=self._spare_rows
            )
        kv = KVCache(
            self.model,
            num_blocks=self._num_blocks,
            block_tokens=config.block_tokens,
            device=self.device,
            dtype=self.dtype,
        )
        self.adapters: tuple[AdapterSpec, ...] = ()
        self.slots = SlotTable(0, UNIT_ELEMENTS)
        self.host = HostTier(HOST_TIER_BYTES)
        bank = None
        if config.resident:
            with self._timed("adapters"):
                bank = self._bank(self._arena_elements())
                self._fill(bank)  # the device draws the numbers while the CPU finds the places
                self.adapters, self.slots = self._place(bank.num_units)
            if config.family == "core":
                with self._timed("basis"):
                    bank.add_basis(_random_basis(self.shape, config.basis_rank, self.device))
        if self.device.type == "cuda":
            # It lives as long as the process: collections (also when a graph is captured) need not
            # walk 100,000 adapters.
            gc.collect()
            gc.freeze()
        self.base_runner, self.runner = self._runners(kv, bank)

    def scheduler(self, *, adapters: bool) -> Scheduler:
        """A fresh one: no requests, an empty prefix cache. With ``adapters``, all are resident."""
        config = self.config
        limits = SchedulerLimits(
            block_tokens=config.block_tokens,
            num_blocks=self._num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self._model_len,
            max_waiting=max(count for count, _ in config.workloads),
            vocab_size=self.model.vocab_size,
        )
        slots = self.slots if adapters else SlotTable(0, UNIT_ELEMENTS)
        return Scheduler(limits, slots, self.model.eos_token_ids)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every step reads: all but an embedding that is only looked up."""
        model = self.model
        elements = _weight_elements(model, self.shape)
        if not model.tie_word_embeddings:
            elements -= model.vocab_size * model.hidden_size
        return elements * self.dtype.itemsize

    @property
    def position_bytes(self) -> int:
        """Bytes of keys and values of one cached position."""
        return KVCache.block_bytes(self.model, block_tokens=1, dtype=self.dtype)

    def adapter_bytes(self, distinct: int) -> int:
        """Bytes that a step reads for rows of so many different adapters, at the least."""
        elements = distinct * self._elements()
        if distinct and self.config.family == "core":  # B, and A behind the weights
            shared = sum(dims.d_out + dims.d_in for dims in self.shape.dims.values())
            elements += self.config.rank * self.model.num_layers * shared
        return elements * self.dtype.itemsize

    def copy_bytes_per_s(self) -> float:
        """Device memory rate of a large copy, bytes read and bytes written; best of ten."""
        size = GIB if self.device.type == "cuda" else 64 << 20
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        best = min(self._seconds(lambda: target.copy_(source)) for _ in range(10))
        return 2 * size / best

    def device_name(self) -> str:
        """The card's name, or ``cpu``."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def _seconds(self, call: Callable[[], object]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begin

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.synchronize()
        self.seconds[part] = round(time.perf_counter() - begin, 2)

    def _runners(self, kv: KVCache, bank: AdapterBank | None) -> tuple[Runner, Runner]:
        """The base's, and that of the engine with adapters."""
        if not self._fused:
            none = self._bank(UNIT_ELEMENTS)
            base = ModelRunner(self.decoder, kv, none, self.host, Sampler())
            if bank is None:
                return base, base
            return base, ModelRunner(self.decoder, kv, bank, self.host, Sampler())
        config = self.config
        limits = RunnerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self._model_len,
        )
        columns = ActiveFamilies(core_columns=self._core_columns)
        with self._timed("gemms"):
            gemms = measure_gemms(self.decoder, limits, (NO_FAMILIES, columns))
        with self._timed("runners"):
            base_runner = make_device_runner(self.decoder, kv, None, None, limits, gemms)
            if bank is None:
                return base_runner, base_runner
            runner = make_device_runner(self.decoder, kv, bank, self.host, limits, gemms)
        return base_runner, runner

    @property
    def _core_columns(self) -> int:
        """Columns of the joint basis that the adapters need; 0: they are not on it."""
        rank = self.config.rank
        if not (self._joint and self.config.resident) or rank > CANONICAL_COLUMNS:
            return 0
        return 16 if rank <= 16 else 32

    @property
    def _joint(self) -> bool:
        fused = self._fused and defers_norms(self.model, self.dtype)
        return fused and self.config.family == "core"

    @property
    def _spare_rows(self) -> int:
        return SPARE_ROWS if self._fused and self.config.resident else 0

    def _bank(self, elements: int) -> AdapterBank:
        return AdapterBank(
            self.shape,
            capacity_bytes=elements * self.dtype.itemsize,
            device=self.device,
            dtype=self.dtype,
            joint=self._joint,
        )

    def _elements(self) -> int:
        """Elements of one record."""
        family = {"core": core, "fold": fold, "lora": lora}[self.config.family]
        return int(family.packed_elements(self.shape, self.config.rank))

    def _arena_elements(self) -> int:
        records = self.config.resident + self.config.spare
        return records * -(-self._elements() // UNIT_ELEMENTS) * UNIT_ELEMENTS

    def _fill(self, bank: AdapterBank) -> None:
        """Random numbers in every record at once; making 100,000 files would take hours."""
        std = adapter_std(self.config.family, self.config.rank)
        generator = torch.Generator(self.device).manual_seed(self.config.seed + 1)
        for part in torch.split(bank.arena, 1 << 28):  # 2^32 elements at once fail in places
            part.normal_(0.0, std, generator=generator)

    def _place(self, num_units: int) -> tuple[tuple[AdapterSpec, ...], SlotTable]:
        config, elements = self.config, self._elements()
        slots = SlotTable(num_units, UNIT_ELEMENTS)
        basis_id = BASIS_ID if config.family == "core" else None
        specs = tuple(
            AdapterSpec(f"{i:064x}", config.family, config.rank, basis_id, elements)
            for i in range(config.resident)
        )
        for spec in specs:
            placed = slots.acquire(spec)
            assert placed is not None, "the arena was made for exactly these"
            slots.release(spec.digest)
        return specs, slots

    def _check(self) -> None:
        config, model = self.config, self.model
        if config.longest > model.max_model_len:
            raise ValueError(
                f"a sequence has {config.longest} tokens: {config.model_shape} takes at"
                f" most {model.max_model_len}"
            )
        if not config.resident:
            return
        narrowest = min(min(dims) for dims in self.shape.dims.values())
        most = min(config.basis_rank, narrowest) if config.family == "core" else narrowest
        if not 1 <= config.rank <= most:
            raise ValueError(f"the rank is {config.rank}: must be from 1 to {most} here")

    def _spare_elements(self) -> int:
        widths = sum(self.shape.group_dims(group).d_in for group in GROUPS)
        return self._spare_rows * self.model.num_layers * widths

    def _check_memory(self) -> None:
        item = self.dtype.itemsize
        model, config = self.model, self.config
        needs = {
            "weights": (_weight_elements(model, self.shape) + self._spare_elements()) * item,
            "KV cache": self._num_blocks
            * KVCache.block_bytes(model, block_tokens=config.block_tokens, dtype=self.dtype),
            "activations": _activation_bytes(config, model, item),
        }
        if self.device.type == "cuda":
            needs["graphs"] = WORKSPACE_BYTES
        if config.resident:
            needs[f"{config.resident} adapters"] = self._arena_elements() * item
            if config.family == "core":
                outputs = sum(dims.d_out for dims in self.shape.dims.values())
                columns = config.basis_rank * (item + 4) + JOINT_COLUMNS * item
                needs["basis"] = model.num_layers * outputs * columns
        free = _free_bytes(self.device)
        total = sum(needs.values())
        if total > free:
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.items())
            raise DoesNotFit(
                f"{total / GIB:.1f} GiB are needed ({parts}) and {free / GIB:.1f} GiB are free on"
                f" {self.device}: ask for fewer resident adapters, requests or tokens"
            )


def _device(asked: str) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda': no CUDA device was found")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def _dtype(asked: str, device: torch.device, model: ModelConfig) -> torch.dtype:
    """As ``shoal serve``: ``auto`` is float32 on a CPU and the model's own type on CUDA."""
    if asked == "auto":
        asked = "float32" if device.type == "cpu" else (model.dtype or "bfloat16")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[asked]


def _num_blocks(config: OfflineConfig) -> int:
    """Room for all that run at once, and for the blocks that the scheduler keeps in reserve."""
    most = max(
        min(count, config.max_num_seqs) * -(-tokens // config.block_tokens)
        for count, tokens in config.workloads
    )
    return most * 102 // 100 + 2


def _weight_elements(model: ModelConfig, shape: BaseShape) -> int:
    linears = sum(dims.d_out * dims.d_in for dims in shape.dims.values())
    tables = 1 if model.tie_word_embeddings else 2
    return model.num_layers * linears + tables * model.vocab_size * model.hidden_size


def _activation_bytes(config: OfflineConfig, model: ModelConfig, item: int) -> int:
    """The largest step, generously, and one tensor of weights while they are being made."""
    widths = 4 * model.intermediate_size + 8 * model.hidden_size + 2 * model.q_size
    logits = config.max_num_seqs * model.vocab_size * (item + 4)
    table = model.vocab_size * model.hidden_size * item
    return config.max_num_batched_tokens * widths * item + logits + table


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # All of it, not what is free: memory used as cache is given up when it is asked for.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _random_basis(shape: BaseShape, rank: int, device: torch.device) -> Basis:
    """Columns of N(0, 1/d_out): orthonormal up to 1/sqrt(d_out), which no timing depends on."""
    generator = torch.Generator(device).manual_seed(2)
    factors = {}
    for target in shape.targets():
        dims = shape.dims[target.module]
        factor = torch.empty(dims.d_out, min(rank, *dims), device=device)
        factors[target] = factor.normal_(0.0, dims.d_out**-0.5, generator=generator)
    return Basis(id=BASIS_ID, rank=rank, factors=factors, kind="canonical")
