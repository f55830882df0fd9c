"""An engine without a server: a named model shape, random weights, random resident adapters.

For benchmarks. The scheduler, the runner, the bank and the kernels are the ones that serve; only
what they work on is made up, on the device, in seconds. It owns making these parts and knowing
whether they fit; what is run and reported is the caller's (``shoal.loadtests.offline``).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shoal.adapters.bank import UNIT_ELEMENTS, AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families import core, fold, lora
from shoal.adapters.host_tier import HostTier
from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec, BaseShape, Family
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.model.config import ModelConfig
from shoal.server.model.dummy import random_decoder
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.runner import ModelRunner
from shoal.server.model.sampler import Sampler
from shoal.server.model.shapes import SHAPES

BASIS_ID = "random"
GIB = 1 << 30
# Deltas about half as large as what they are added to, with weights of standard deviation 0.02:
# large enough to change greedy tokens, small enough to keep activations where they are.
DELTA = 0.5
WEIGHT_STD = 0.02


class DoesNotFit(ValueError):
    """What was asked needs more memory than the device has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineConfig:
    """What to build.

    Attributes:
        model_shape: a key of ``SHAPES``.
        resident: adapters in the bank; 0 makes only the base.
        max_num_seqs, max_num_batched_tokens: as of ``shoal serve``.
        sequences, sequence_tokens: how many sequences of how many tokens the KV cache must hold.
    """

    model_shape: str
    device: str = "auto"
    dtype: str = "auto"
    family: Family = "core"
    rank: int = 16
    resident: int = 0
    basis_rank: int = 64
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_tokens: int = 16
    sequences: int = 256
    sequence_tokens: int = 256
    seed: int = 0


class OfflineEngine:
    """One model on one device, with an engine that has adapters and one that has none.

    Both share the weights and the KV cache, and take turns.
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
        self._check()
        self._num_blocks = _num_blocks(config)
        self._check_memory()
        self.decoder = random_decoder(self.model, self.device, self.dtype, config.seed)
        kv = KVCache(
            self.model,
            num_blocks=self._num_blocks,
            block_tokens=config.block_tokens,
            device=self.device,
            dtype=self.dtype,
        )
        self.base_runner = self._runner(kv, self._bank(UNIT_ELEMENTS))
        self.adapters: tuple[AdapterSpec, ...] = ()
        self._slots = SlotTable(0, UNIT_ELEMENTS)
        self.runner = self.base_runner
        if config.resident:
            bank = self._bank(self._arena_elements())
            if config.family == "core":
                bank.add_basis(_random_basis(self.shape, config.basis_rank, self.device))
            self._fill(bank)
            self.adapters, self._slots = self._place(bank.num_units)
            self.runner = self._runner(kv, bank)
        self.synchronize()

    def scheduler(self, *, adapters: bool) -> Scheduler:
        """A fresh one: no requests, an empty prefix cache. With ``adapters``, all are resident."""
        config = self.config
        limits = SchedulerLimits(
            block_tokens=config.block_tokens,
            num_blocks=self._num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.model.max_model_len,
            max_waiting=config.sequences,
            vocab_size=self.model.vocab_size,
        )
        slots = self._slots if adapters else SlotTable(0, UNIT_ELEMENTS)
        return Scheduler(limits, slots, self.model.eos_token_ids)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every step reads: all but an embedding that is only looked up."""
        parts = sum(p.numel() * p.element_size() for p in self.decoder.parameters())
        embed = self.decoder.embed
        tied = self.model.tie_word_embeddings
        return parts - (0 if tied else embed.numel() * embed.element_size())

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

    def _runner(self, kv: KVCache, bank: AdapterBank) -> ModelRunner:
        # The host tier stays empty: every adapter is in the bank before the first step.
        return ModelRunner(self.decoder, kv, bank, HostTier(1), Sampler())

    def _bank(self, elements: int) -> AdapterBank:
        return AdapterBank(
            self.shape,
            capacity_bytes=elements * self.dtype.itemsize,
            device=self.device,
            dtype=self.dtype,
        )

    def _elements(self) -> int:
        """Elements of one record."""
        family = {"core": core, "fold": fold, "lora": lora}[self.config.family]
        return int(family.packed_elements(self.shape, self.config.rank))

    def _arena_elements(self) -> int:
        return self.config.resident * -(-self._elements() // UNIT_ELEMENTS) * UNIT_ELEMENTS

    def _fill(self, bank: AdapterBank) -> None:
        """Random numbers in every record at once; making 100,000 files would take hours."""
        rank = self.config.rank
        std = {
            "core": DELTA / rank**0.5,  # R (r, r) turns r projections into r
            "fold": DELTA * WEIGHT_STD,  # r sums of d_in / r inputs, like d_in inputs
            "lora": (DELTA * WEIGHT_STD / rank**0.5) ** 0.5,  # the same std in A and in B
        }[self.config.family]
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
        if config.sequence_tokens > model.max_model_len:
            raise ValueError(
                f"a sequence has {config.sequence_tokens} tokens: {config.model_shape} takes at"
                f" most {model.max_model_len}"
            )
        if not config.resident:
            return
        narrowest = min(min(dims) for dims in self.shape.dims.values())
        most = min(config.basis_rank, narrowest) if config.family == "core" else narrowest
        if not 1 <= config.rank <= most:
            raise ValueError(f"the rank is {config.rank}: must be from 1 to {most} here")

    def _check_memory(self) -> None:
        item = self.dtype.itemsize
        model, config = self.model, self.config
        needs = {
            "weights": _weight_elements(model, self.shape) * item,
            "KV cache": self._num_blocks
            * KVCache.block_bytes(model, block_tokens=config.block_tokens, dtype=self.dtype),
            "activations": _activation_bytes(config, model, item),
        }
        if config.resident:
            needs[f"{config.resident} adapters"] = self._arena_elements() * item
            if config.family == "core":
                outputs = sum(dims.d_out for dims in self.shape.dims.values())
                needs["basis"] = model.num_layers * outputs * config.basis_rank * (item + 4)
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
    each = -(-config.sequence_tokens // config.block_tokens)
    return each * min(config.sequences, config.max_num_seqs) * 102 // 100 + 2


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
