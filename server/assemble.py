"""Builds a running engine from a ``ServeConfig``: the one place where the parts meet.

Model -> basis -> device bank and adapter library -> runner -> ``Parts`` -> scheduler and loop ->
``Services``.
It owns the order of start-up and of shutdown; each part's behaviour is in its own module.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch

from shoal.adapters.bank import AdapterBank
from shoal.adapters.base import base_digest
from shoal.adapters.basis import Basis, BasisStore, canonical_basis, canonical_path
from shoal.adapters.families import core
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary, places
from shoal.adapters.registry.shared_bases import SharedBases
from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import UNIT_ELEMENTS, BaseShape
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.tables import ActiveFamilies
from shoal.adapters.weights import WeightOf
from shoal.server.config import (
    EnginePlan,
    MemoryFacts,
    ModelFacts,
    ServeConfig,
    plan_engine,
    resolve_dtype,
)
from shoal.server.engine.client import EngineClient
from shoal.server.engine.loop import Deliver, EngineLoop
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.garbage import Tidying
from shoal.server.model import gemms
from shoal.server.model.attention import AttentionName, resolve_attention
from shoal.server.model.attention_xformers import XformersAttention, check_model
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder
from shoal.server.model.device_runner import DeviceRunner, RunnerLimits
from shoal.server.model.dummy import dummy_basis
from shoal.server.model.fused import defers_norms
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.pull import resolve_model
from shoal.server.model.runner import ModelRunner
from shoal.server.model.sampler import Sampler
from shoal.server.model.starting import make_device_runner, start_device_runner
from shoal.server.model.tokenizer import Tokenizer
from shoal.server.model.weights import exact_weight_of, load_model, read_config
from shoal.server.progress import Bars
from shoal.server.reserve import StepSizes, reserve_parts

if TYPE_CHECKING:
    from shoal.server.http.services import Services

SHIPPED = Path(__file__).resolve().parent.parent / "adapters" / "shipped"

log = logging.getLogger(__name__)

# Of the LoRA-XS adapters that the device bank is sized for.
ADAPTER_RANK = 16
# Sets of families whose steps are captured at start: LoRA-XS of ranks to 16 and to 32.
CAPTURED = (
    ActiveFamilies(core_columns=16, core_alignment=8),
    ActiveFamilies(core_columns=32, core_alignment=8),
)
# Sets that are compiled at start and captured in idle moments: the same where a rank is no multiple
# of 8.
LATER = (
    ActiveFamilies(core_columns=16, core_alignment=1),
    ActiveFamilies(core_columns=32, core_alignment=1),
)
# Sets that are captured when they are first needed, and only compiled at start.
COMPILED = (
    ActiveFamilies(fold_rank=16),
    ActiveFamilies(fold_rank=64),
    ActiveFamilies(lora_rank=16, scale=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A model, its adapters and what runs both, built for ``config`` and not started.

    The runner, the KV cache and the bank belong to one user at a time: a loop of ``make_loop``
    while its thread runs, or else whoever drives the runner itself.
    """

    config: ServeConfig
    plan: EnginePlan
    decoder: Decoder
    tokenizer: Tokenizer
    bank: AdapterBank
    host: HostTier
    library: AdapterLibrary
    runner: DeviceRunner | ModelRunner

    def make_loop(self, deliver: Deliver) -> EngineLoop:
        """An engine that has served nothing yet; its thread is not started."""
        return EngineLoop(
            Scheduler(
                SchedulerLimits(
                    block_tokens=self.plan.block_tokens,
                    num_blocks=self.plan.num_blocks,
                    max_num_seqs=self.config.max_num_seqs,
                    max_num_batched_tokens=self.config.max_num_batched_tokens,
                    max_model_len=self.plan.max_model_len,
                    max_waiting=self.config.max_waiting,
                    max_waiting_per_tenant=self.config.max_waiting_per_tenant,
                    max_wait_s=self.config.max_wait,
                    vocab_size=self.decoder.config.vocab_size,
                    recorded_prompts=self.runner.recorded_prompts,
                ),
                SlotTable(self.bank.num_units, UNIT_ELEMENTS),
                self.decoder.config.eos_token_ids,
            ),
            self.runner,
            deliver,
            staged=self.host,
            idle=self._idle(),
        )

    def _idle(self) -> Callable[[], bool]:
        """What the engine does while nobody waits, a piece at a time."""
        tidy = Tidying()
        if not isinstance(self.runner, DeviceRunner):
            return tidy
        prepare = self.runner.prepare
        return lambda: prepare() or tidy()


@contextmanager
def assemble(config: ServeConfig) -> Iterator["Services"]:
    """As ``build``, with what HTTP needs around it.

    The engine is started and stopped by whoever has the event loop (the app's lifespan).

    Raises:
        As ``build``.
    """
    # Imported here: what runs an engine in its own process needs no web framework.
    from shoal.server.http.services import Services

    with build(config) as parts:
        yield Services(
            config=config,
            engine=EngineClient(parts.make_loop),
            library=parts.library,
            keys=parts.library.keys,
            tokenizer=parts.tokenizer,
            model_name=config.base_name,
            model_root=config.model,
            max_model_len=parts.plan.max_model_len,
            vocab_size=parts.decoder.config.vocab_size,
        )


@contextmanager
def build(config: ServeConfig, *, prepared: bool = True) -> Iterator[Parts]:
    """Load the model, build everything, close the registry at the end.

    Args:
        prepared: compile, measure and capture what steps will need now, so that none of them has
            to wait for it. Without, the first steps do.

    Raises:
        ModelError: the model cannot be fetched or loaded.
        ValueError: what was asked does not fit the device or the model.
        RegistryError: the adapter registry cannot be opened.
    """
    path = resolve_model(config.model)
    device = resolve_device(config.device)
    attention = resolve_attention(config.attention, device)
    facts = read_config(path)
    dtype = torch_dtype(
        resolve_dtype(config.dtype, device=device.type, checkpoint_dtype=facts.dtype or "float32")
    )
    if attention == "xformers":
        check_model(facts, dtype)
    log.info("loading model=%s device=%s dtype=%s", path, device, dtype)
    clock = _Clock(device)
    fused = runs_fused(device, attention)
    joint = fused and defers_norms(facts, dtype)
    with Bars() as bars:
        decoder = load_model(
            path,
            device=device,
            dtype=dtype,
            load_format="dummy" if config.load_format == "dummy" else "auto",
            spare_rows=gemms.SPARE_ROWS if joint else 0,
            progress=partial(bars, "loading weights"),
        )
    clock.lap("model")
    tokenizer = Tokenizer.load(path)
    clock.lap("tokenizer")
    shape, basis = _shape_and_basis(config, path, decoder)
    clock.lap("basis")
    plan = plan_engine(
        config,
        device=device.type,
        model=_model_facts(decoder.config, shape),
        memory=_memory(config, decoder, shape),
    )
    log.info("engine %s", plan)
    spectral_bytes = config.spectral_bytes(device.type)
    bank = AdapterBank(
        shape,
        capacity_bytes=plan.arena_bytes,
        device=device,
        dtype=dtype,
        joint=joint,
        spectral_bytes=spectral_bytes,
    )
    host = HostTier(config.host_adapter_memory)
    spectral = None
    if spectral_bytes and config.load_format != "dummy":
        spectral = SpectralBasis(
            exact_weight_of(decoder, path), shape, bases_cache(), admit=bank.check_spectral
        )
    clock.lap("bank")
    library = _open_library(config, path, decoder, shape, basis, bank, host, dtype, spectral)
    clock.lap("library")
    if config.upload_processes():
        # Beside a GPU there are cores for it while kernels are compiled and graphs captured; on a
        # CPU it would take the engine's, for uploads that may never come.
        library.prepare_apart(config.upload_processes(), ahead=device.type == "cuda")
    try:
        clock.lap("helpers")
        runner = _runner(config, plan, decoder, bank, host, basis, attention, prepared)
        clock.lap("runner")
        log.info("ready to listen %s", clock.report())
        yield Parts(
            config=config,
            plan=plan,
            decoder=decoder,
            tokenizer=tokenizer,
            bank=bank,
            host=host,
            library=library,
            runner=runner,
        )
    finally:
        gc.unfreeze()  # as `_runner` may have left it
        library.close()


class _Clock:
    """How long each part of start-up took; what was launched on the device counts where it was."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._last = time.perf_counter()
        self._parts: list[str] = []

    def lap(self, name: str) -> None:
        """End a part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._parts.append(f"{name}_s={now - self._last:.1f}")
        self._last = now

    def report(self) -> str:
        """All parts and their sum."""
        return " ".join([*self._parts, f"total_s={self._last - self._begin:.1f}"])


def resolve_device(asked: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda': must be cpu or auto, no CUDA device was found")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def load_canonical_basis(weight_of: WeightOf, shape: BaseShape, rank: int) -> Basis:
    """The base's canonical basis, from the user's cache or computed once, with progress.

    Args:
        weight_of: the checkpoint's weights, not rounded to what the server runs in: the basis is
            shared with everyone who has the same base.
    """
    cache = bases_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with Bars() as bars:
        return canonical_basis(weight_of, shape, rank, cache, partial(bars, "computing the basis"))


def canonical_file(path: Path, rank: int) -> tuple[BaseShape, Path]:
    """What adapters of the base at ``path`` must fit, and the file of its canonical basis.

    Loads the model only where the basis is not in the user's cache yet.

    Raises:
        ModelError: the model cannot be loaded.
    """
    shape = read_config(path).base_shape(path.stem, base_digest(path))
    cached = canonical_path(bases_cache(), shape, rank)
    if not cached.exists():
        decoder = load_model(
            path, device=torch.device("cpu"), dtype=torch.float32, load_format="auto"
        )
        load_canonical_basis(decoder.weight_of, shape, rank)
    return shape, cached


def bases_cache() -> Path:
    """Where what is computed of bases is kept."""
    return platformdirs.user_cache_path("shoal") / "bases"


def _shape_and_basis(config: ServeConfig, path: Path, decoder: Decoder) -> tuple[BaseShape, Basis]:
    """What adapters must fit, and the basis that they share."""
    if config.load_format == "dummy":
        with Bars() as bars:
            return dummy_basis(
                decoder.config,
                config.base_name,
                config.basis_rank,
                decoder.device,
                decoder.dtype,
                partial(bars, "drawing a basis"),
            )
    shape = decoder.config.base_shape(config.base_name, base_digest(path))
    weight_of = exact_weight_of(decoder, path)
    return shape, load_canonical_basis(weight_of, shape, config.basis_rank)


def _open_library(
    config: ServeConfig,
    path: Path,
    decoder: Decoder,
    shape: BaseShape,
    basis: Basis,
    bank: AdapterBank,
    host: HostTier,
    dtype: torch.dtype,
    spectral: SpectralBasis | None,
) -> AdapterLibrary:
    registry_url = config.registry_url
    if config.registry is None:
        platformdirs.user_data_path("shoal").mkdir(parents=True, exist_ok=True)
    shared = SharedBases.open(places(registry_url, config.store))
    bases = BasisStore(shared.folder, shared)
    dummy = config.load_format == "dummy"
    if not dummy:
        # Kept beside the adapters that are written in it: should this machine's cache be lost and
        # the basis come out a rounding error apart, they still find the one they were stored with.
        bases.add(basis)
    bank.add_basis(basis)
    return AdapterLibrary.open(
        registry_url=registry_url,
        store_url=config.store,
        shape=shape,
        # What uploads are compared with, and what is kept for them, is the checkpoint's.
        weight_of=decoder.weight_of if dummy else exact_weight_of(decoder, path),
        canonical=basis,
        bases=bases,
        host=host,
        on_basis=bank.add_basis,
        dtype=dtype,
        reserved_names=frozenset({config.base_name.lower()}),
        max_upload_bytes=config.max_upload_bytes,
        max_packed_bytes=bank.num_units * UNIT_ELEMENTS * dtype.itemsize,
        shipped=shipped_folder(config.model) if config.shipped_adapters else None,
        spectral=spectral,
        on_spectral=bank.add_spectral,
    )


def shipped_folder(model: str) -> Path | None:
    """The adapters that ship for a base known by name; a path has none, whatever lies there."""
    found = [folder for folder in SHIPPED.iterdir() if folder.is_dir() and folder.name == model]
    return found[0] if found else None


def runs_fused(device: torch.device, attention: AttentionName) -> bool:
    """Whether ``DeviceRunner`` serves; ``--attention torch`` keeps the plain runner, its check."""
    return device.type == "cuda" and attention != "torch"


def prepared_families(basis_id: str, *, joint: bool) -> tuple[Sequence[ActiveFamilies], ...]:
    """What a GPU's server is prepared for: ``families``, ``later``, ``compiled`` of its start.

    Args:
        basis_id: the base's own basis.
        joint: whether there is a joint basis.
    """
    # LoRA-XS as it is served where there is no joint basis, and beyond its ranks where there is.
    wide = ActiveFamilies(core_alignment=8, wide_bases=(basis_id,), wide_rank=ADAPTER_RANK)
    if joint:
        return CAPTURED, LATER, (*COMPILED, wide)
    return (wide,), (replace(wide, core_alignment=1),), COMPILED


def _runner(
    config: ServeConfig,
    plan: EnginePlan,
    decoder: Decoder,
    bank: AdapterBank,
    host: HostTier,
    basis: Basis,
    attention: AttentionName,
    prepared: bool,
) -> DeviceRunner | ModelRunner:
    """What executes steps, ready to do so at full speed when it is to be ``prepared``."""
    kv = KVCache(
        decoder.config,
        num_blocks=plan.num_blocks,
        block_tokens=plan.block_tokens,
        device=decoder.device,
        dtype=decoder.dtype,
    )
    if not runs_fused(decoder.device, attention):
        return ModelRunner(decoder, kv, bank, host, Sampler())
    limits = RunnerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
    )
    lengths = XformersAttention if attention == "xformers" else None
    if not prepared:
        return make_device_runner(decoder, kv, bank, host, limits, gemms.NO_PLAN, lengths)
    # What is here now lives as long as the process: collections, of which each graph that is
    # captured may start one, need not walk it.
    gc.collect()
    gc.freeze()
    families, later, compiled = prepared_families(basis.id, joint=bank.joint is not None)
    with Bars() as bars:
        return start_device_runner(
            decoder,
            kv,
            bank,
            host,
            limits,
            families=families,
            later=later,
            compiled=compiled,
            attention=lengths,
            progress=bars,
        )


def _model_facts(config: ModelConfig, shape: BaseShape) -> ModelFacts:
    elements = core.packed_elements(shape, ADAPTER_RANK)
    return ModelFacts(
        kv_elements_per_token=2 * config.num_layers * config.kv_size,
        max_model_len=config.max_model_len,
        checkpoint_dtype=config.dtype or "float32",
        adapter_elements=-(-elements // UNIT_ELEMENTS) * UNIT_ELEMENTS,
        unit_elements=UNIT_ELEMENTS,
    )


def _memory(config: ServeConfig, decoder: Decoder, shape: BaseShape) -> MemoryFacts:
    if decoder.device.type == "cpu":
        return MemoryFacts(total_bytes=0, free_bytes=0)
    model = decoder.config
    parts = reserve_parts(
        StepSizes(
            tokens=config.max_num_batched_tokens,
            rows=config.max_num_seqs,
            positions=config.max_model_len or model.max_model_len,
            item=decoder.dtype.itemsize,
            hidden=model.hidden_size,
            intermediate=model.intermediate_size,
            q_size=model.q_size,
            head_dim=model.head_dim,
            vocab=model.vocab_size,
            layers=model.num_layers,
            outputs=sum(dims.d_out for dims in shape.dims.values()),
            basis_rank=config.basis_rank,
            block_tokens=config.block_size,
        )
    )
    parts["spectral"] = config.spectral_bytes(decoder.device.type)
    # What making the weights took for a moment is counted as free.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(decoder.device)
    log.info(
        "memory total=%d free=%d reserved: %s",
        total,
        free,
        " ".join(f"{name}={size}" for name, size in parts.items()),
    )
    return MemoryFacts(total_bytes=total, free_bytes=free, reserve_bytes=sum(parts.values()))
