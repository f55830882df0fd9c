"""Builds a running engine from a ``ServeConfig``: the one place where the parts meet.

Model -> basis -> device bank and adapter library -> scheduler, runner and loop -> ``Services``.
It owns the order of start-up and of shutdown; each part's behaviour is in its own module.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
import torch
from tqdm import tqdm

from shoal.adapters.bank import UNIT_ELEMENTS, AdapterBank
from shoal.adapters.base import base_digest
from shoal.adapters.basis import Basis, BasisStore, canonical_basis
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary, places
from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import BaseShape
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
from shoal.server.http.services import Services
from shoal.server.model.attention import choose_attention
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.pull import resolve_model
from shoal.server.model.runner import ModelRunner
from shoal.server.model.sampler import Sampler
from shoal.server.model.tokenizer import Tokenizer
from shoal.server.model.weights import exact_weight_of, load_model, read_config

SHIPPED = Path(__file__).resolve().parent.parent / "adapters" / "shipped"

log = logging.getLogger(__name__)


@contextmanager
def assemble(config: ServeConfig) -> Iterator[Services]:
    """Load the model, build everything, close the registry at the end.

    The engine is started and stopped by whoever has the event loop (the app's lifespan).

    Raises:
        ModelError: the model cannot be fetched or loaded.
        ValueError: what was asked does not fit the device or the model.
        RegistryError: the adapter registry cannot be opened.
    """
    path = resolve_model(config.model)
    device = resolve_device(config.device)
    begin_attention = choose_attention(config.attention, device)
    facts = read_config(path)
    dtype = torch_dtype(
        resolve_dtype(config.dtype, device=device.type, checkpoint_dtype=facts.dtype or "float32")
    )
    log.info("loading model=%s device=%s dtype=%s", path, device, dtype)
    decoder = load_model(
        path,
        device=device,
        dtype=dtype,
        load_format="dummy" if config.load_format == "dummy" else "auto",
    )
    decoder.begin_attention = begin_attention
    tokenizer = Tokenizer.load(path)
    weight_of: WeightOf = decoder.weight_of
    if config.load_format == "dummy":
        digest = _dummy_digest(facts, device, dtype)
    else:
        digest = base_digest(path)
        weight_of = exact_weight_of(decoder, path)
    shape = decoder.config.base_shape(config.base_name, digest)
    basis = load_canonical_basis(weight_of, shape, config.basis_rank)
    plan = plan_engine(
        config, device=device.type, model=_model_facts(decoder.config), memory=_memory(device)
    )
    log.info("engine %s", plan)
    bank = AdapterBank(shape, capacity_bytes=plan.arena_bytes, device=device, dtype=dtype)
    host = HostTier(config.host_adapter_memory)
    library = _open_library(config, decoder, shape, basis, bank, host, dtype)
    engine = EngineClient(_engine_loop(config, plan, decoder, bank, host))
    try:
        yield Services(
            config=config,
            engine=engine,
            library=library,
            tokenizer=tokenizer,
            model_name=config.base_name,
            model_root=config.model,
            max_model_len=plan.max_model_len,
            vocab_size=decoder.config.vocab_size,
        )
    finally:
        library.close()


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
    cache = platformdirs.user_cache_path("shoal") / "bases"
    cache.mkdir(parents=True, exist_ok=True)
    with ExitStack() as bars:
        shown: list[Any] = []

        def progress(done: int, total: int) -> None:
            if not shown:  # only when there is something to compute
                bar = tqdm(total=total, unit="target", desc="computing the basis", disable=None)
                shown.append(bars.enter_context(bar))
            shown[0].update(done - shown[0].n)

        return canonical_basis(weight_of, shape, rank, cache, progress)


def _dummy_digest(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Identity of random weights: neither their basis nor their adapters are the real base's."""
    return hashlib.sha256(f"dummy {device.type} {dtype} {config}".encode()).hexdigest()


def _open_library(
    config: ServeConfig,
    decoder: Decoder,
    shape: BaseShape,
    basis: Basis,
    bank: AdapterBank,
    host: HostTier,
    dtype: torch.dtype,
) -> AdapterLibrary:
    registry_url = config.registry_url
    if config.registry is None:
        platformdirs.user_data_path("shoal").mkdir(parents=True, exist_ok=True)
    bases = BasisStore(places(registry_url, config.store).bases)
    # Kept beside the adapters that are written in it: should this machine's cache be lost and the
    # basis come out a rounding error apart, they still find the very one they were stored with.
    bases.add(basis)
    bank.add_basis(basis)
    return AdapterLibrary.open(
        registry_url=registry_url,
        store_url=config.store,
        shape=shape,
        weight_of=decoder.weight_of,
        canonical=basis,
        bases=bases,
        host=host,
        on_basis=bank.add_basis,
        dtype=dtype,
        reserved_names=frozenset({config.base_name.lower()}),
        max_upload_bytes=config.max_upload_bytes,
        max_packed_bytes=bank.num_units * UNIT_ELEMENTS * dtype.itemsize,
        shipped=shipped_folder(config.model) if config.shipped_adapters else None,
    )


def shipped_folder(model: str) -> Path | None:
    """The adapters that ship for a base known by name; a path has none, whatever lies there."""
    found = [folder for folder in SHIPPED.iterdir() if folder.is_dir() and folder.name == model]
    return found[0] if found else None


def _engine_loop(
    config: ServeConfig, plan: EnginePlan, decoder: Decoder, bank: AdapterBank, host: HostTier
) -> Callable[[Deliver], EngineLoop]:
    kv = KVCache(
        decoder.config,
        num_blocks=plan.num_blocks,
        block_tokens=plan.block_tokens,
        device=decoder.device,
        dtype=decoder.dtype,
    )
    scheduler = Scheduler(
        SchedulerLimits(
            block_tokens=plan.block_tokens,
            num_blocks=plan.num_blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            max_waiting=config.max_waiting,
            vocab_size=decoder.config.vocab_size,
        ),
        SlotTable(bank.num_units, UNIT_ELEMENTS),
        decoder.config.eos_token_ids,
    )
    runner = ModelRunner(decoder, kv, bank, host, Sampler())
    return partial(EngineLoop, scheduler, runner, staged=host)


def _model_facts(config: ModelConfig) -> ModelFacts:
    return ModelFacts(
        kv_elements_per_token=2 * config.num_layers * config.kv_size,
        max_model_len=config.max_model_len,
        checkpoint_dtype=config.dtype or "float32",
    )


def _memory(device: torch.device) -> MemoryFacts:
    if device.type == "cpu":
        return MemoryFacts(total_bytes=0, free_bytes=0)
    free, total = torch.cuda.mem_get_info(device)
    return MemoryFacts(total_bytes=total, free_bytes=free)
