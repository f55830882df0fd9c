"""``train_fleet``: many tenants' adapters on one resident base, from options to adapters."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.activations import checkpoint_activations
from shoal.adapters.training.attention import use_causal_attention
from shoal.adapters.training.data import Example, load_examples, read_records
from shoal.adapters.training.environment import describe
from shoal.adapters.training.errors import OptionRejected, ResumeMismatch, RunDirectoryError
from shoal.adapters.training.fleet.bank import Bank
from shoal.adapters.training.fleet.config import FleetConfig
from shoal.adapters.training.fleet.finishing import Finished, Finishing, Publisher
from shoal.adapters.training.fleet.fleetdir import FleetDirectory
from shoal.adapters.training.fleet.inputs import Row
from shoal.adapters.training.fleet.linears import attach_banks, values_per_lane
from shoal.adapters.training.fleet.loop import FleetLoop, FleetStepMetrics, OnFleetStep, settled
from shoal.adapters.training.fleet.members import Member
from shoal.adapters.training.fleet.products import Step
from shoal.adapters.training.fleet.step import FleetStep, Recorder
from shoal.adapters.training.fleet.tenants import Tenant, read_tenants
from shoal.adapters.training.fleet.turns import Turns
from shoal.adapters.training.interrupt import StopRequest
from shoal.adapters.training.loading import (
    Base,
    check_tokens,
    device_of,
    exact_weights,
    fitting,
    load_base,
)
from shoal.adapters.training.methods.attaching import shape_of
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.metrics import keep_until
from shoal.adapters.training.norms import fuse_norms
from shoal.adapters.training.rotary import fuse_rotary
from shoal.adapters.training.rundir import claimed
from shoal.adapters.training.runner import CudaRecorder
from shoal.adapters.training.world import World

# Values, gradients, their copy, and two moments; with the best values kept, one more.
COPIES = 5
DEFAULT_BANK_BYTES = 8 << 30

# Options that do not change what is learnt, or that every tenant has of its own.
_FREE_OPTIONS = (
    "base", "data", "out", "format", "eval_data", "eval_every", "save_every", "device", "resume",
    "overwrite", "checkpoint_activations", "graphs", "seed", "steps", "lr", "batch_size",
    "patience",
)  # fmt: skip

# Opens what finished adapters are published to.
OpenPublisher = Callable[[Source], Publisher]


@dataclass(frozen=True, slots=True)
class FleetResult:
    """How a fleet ended.

    Attributes:
        finished: False when it was interrupted; ``--resume`` goes on.
        steps: of the fleet.
        tenants: who is finished, in the order in which they were.
        parameters: trained values of one adapter.
        resident: slots of the bank.
    """

    finished: bool
    steps: int
    tenants: Sequence[Finished]
    parameters: int
    resident: int


def train_fleet(
    config: FleetConfig,
    *,
    cache_dir: Path,
    progress: bool = True,
    on_step: OnFleetStep | None = None,
    publisher: OpenPublisher | None = None,
) -> FleetResult:
    """Train all tenants and write their adapters below the run directory.

    Each gets, to rounding, the adapter that a plain run with its options would give it.

    Args:
        config: what to do.
        cache_dir: where what was computed of bases is kept.
        progress: draw progress bars on standard error.
        on_step: called after every step of the fleet.
        publisher: opened when the base is known; each adapter goes there as soon as it is finished.

    Returns:
        How it ended. SIGINT or SIGTERM ends it after the current step, with a checkpoint.

    Raises:
        TrainingError: an option, a tenant, its data, the base or the run directory breaks a rule.
            What is refused leaves the run directory as it was.
    """
    common = config.common
    processes = World.of_environment().size
    if processes > 1:
        raise OptionRejected("fleet", config.fleet, f"is trained by one process, not {processes}")
    directory = FleetDirectory(common.out)
    directory.check(resume=common.resume, overwrite=common.overwrite)
    with ExitStack() as stack:
        if common.resume:
            stack.enter_context(claimed(directory.path))
        return _train(config, cache_dir, progress, on_step, publisher, stack)


def _train(
    config: FleetConfig,
    cache_dir: Path,
    progress: bool,
    on_step: OnFleetStep | None,
    publisher: OpenPublisher | None,
    stack: ExitStack,
) -> FleetResult:
    """What is entered on the stack stays until the fleet has ended."""
    common, directory = config.common, FleetDirectory(config.common.out)
    tenants = read_tenants(config)
    # Loading the base takes a while: what is wrong with the records is said before it.
    sources = (path for t in tenants for path in (t.config.data, t.config.eval_data) if path)
    for path in dict.fromkeys(sources):
        read_records(path)
    base = load_base(common.base, device_of(common.device), common.dtype)
    common = fitting(common, base)
    config = replace(config, common=common)
    members = _members(config, tenants, base)
    shape = shape_of(base.model, common.base.stem, base.digest)
    source = Source(
        exact_weights(base), shape, cache_dir, basis_rank=common.basis_rank, progress=progress
    )
    size = values_per_lane(base.model, common)
    resumed = directory.load() if common.resume else None
    capacity = _capacity(config, tenants, size)
    if resumed is not None and config.resident is None:
        # Tenants that were added since give no reason to have another bank.
        capacity = resumed[1]["fingerprint"]["resident"]
    core = fleet_step(config, base, source, capacity)
    keep_best = any(tenant.config.patience is not None for tenant in tenants)
    bank = Bank(core.banks, core.optimizer, source, keep_best=keep_best)
    sizes = {name: member.tenant.config.batch_size for name, member in members.items()}
    loop = FleetLoop(
        members,
        Turns(capacity, config.rows, sizes),
        bank,
        core,
        directory,
        rows=config.rows,
        save_every=common.save_every,
        fingerprint=_fingerprint(config, base, capacity),
    )
    before: list[Finished] = []
    if resumed is not None:
        before = settled(resumed[1]["finished"])
        _check_same(resumed[1], _fingerprint(config, base, capacity), members, directory)
        for result in before:
            members[result.reference].step = result.steps
        try:
            loop.restore(*resumed)
        except (KeyError, RuntimeError) as error:
            rule = f"{directory.checkpoint} is not a fleet's checkpoint: {error}"
            raise RunDirectoryError(rule) from error
        keep_until(directory.steps, loop.step)
    target = None if publisher is None else publisher(source)
    if common.resume:
        directory.sweep()
    else:
        stack.enter_context(claimed(directory.path))
        # Another process may have been here since.
        directory.check(resume=False, overwrite=common.overwrite)
        directory.clear()
    _write_options(directory, config, tenants, base, size, capacity)
    bar = stack.enter_context(
        tqdm(
            total=sum(tenant.config.steps for tenant in tenants),
            initial=sum(member.step for member in members.values()),
            unit="step",
            disable=not progress,
        )
    )
    stop = stack.enter_context(StopRequest())
    finishing = stack.enter_context(Finishing(directory.results, target))
    finishing.adopt(before, {name: member.tenant for name, member in members.items()})

    def report(done: FleetStepMetrics) -> None:
        rate = done.tokens / max(done.seconds, 1e-9)
        # Drawn by `update`, which knows how often is often enough.
        shown = {"loss": f"{done.loss:.3f}", "tokens_s": f"{rate:.0f}", "finished": done.finished}
        bar.set_postfix(shown, refresh=False)
        bar.update(done.tenants)
        if on_step is not None:
            on_step(done)

    finished = loop.run(finishing, lambda: stop.requested, report)
    results = finishing.settle()
    return FleetResult(finished, loop.step, results, size, capacity)


def fleet_step(config: FleetConfig, base: Base, source: Source, capacity: int) -> FleetStep:
    """Put a bank on the base, and make what computes steps."""
    common, step = config.common, Step()
    banks = attach_banks(base.model, common, source, capacity, step)
    use_causal_attention(base.model)
    fuse_norms(base.model)
    fuse_rotary(base.model)
    if common.checkpoint_activations:
        checkpoint_activations(base.model)
    recorder: Recorder | None = None
    if common.graphs == "auto" and base.device.type == "cuda":
        recorder = CudaRecorder(base.device)
    return FleetStep(
        base.model,
        banks,
        step,
        weight_decay=common.weight_decay,
        clip=common.clip,
        recorder=recorder,
    )


def _members(config: FleetConfig, tenants: Sequence[Tenant], base: Base) -> dict[str, Member]:
    """Every tenant with its data, tokenised; a file that several have is read once."""

    @functools.cache
    def load(path: Path) -> tuple[list[Row], str]:
        common = config.common
        too_long: Any = common.too_long
        examples: list[Example] = load_examples(
            path, base.tokenizer, common.max_length, too_long=too_long
        )
        check_tokens(base, examples)
        digest = hashlib.sha256()
        for example in examples:
            digest.update(repr(example).encode())
        return [Row.of(example) for example in examples], digest.hexdigest()

    members = {}
    for tenant in tenants:
        own = tenant.config
        rows, digest = load(own.data)
        evaluation, measured = ([], "") if own.eval_data is None else load(own.eval_data)
        identity = [own.seed, own.steps, own.learning_rate, own.batch_size, digest]
        if own.patience is not None:
            identity += [own.patience, own.evaluation_interval, measured]
        members[tenant.reference] = Member(tenant, rows, evaluation, json.dumps(identity))
    return members


def _capacity(config: FleetConfig, tenants: Sequence[Tenant], size: int) -> int:
    """How many slots the bank has: never more than there are tenants."""
    if config.resident is not None:
        return min(config.resident, len(tenants))
    fits = DEFAULT_BANK_BYTES // (COPIES * 4 * size)
    one_step = config.rows // min(tenant.config.batch_size for tenant in tenants)
    return min(len(tenants), max(one_step, fits))


def _fingerprint(config: FleetConfig, base: Base, capacity: int) -> dict[str, Any]:
    """What a resumed fleet must share with this one, besides its tenants."""
    options = asdict(config.common)
    for name in _FREE_OPTIONS:
        del options[name]
    return {
        **json.loads(json.dumps(options, default=str)),
        "rows": config.rows,
        "resident": capacity,
        "base_digest": base.digest,
    }


def _check_same(
    head: Mapping[str, Any],
    current: Mapping[str, Any],
    members: Mapping[str, Member],
    directory: FleetDirectory,
) -> None:
    """Refuse a checkpoint of another fleet.

    Tenants may have been added to the file since; those that were there must be as they were.
    """
    saved = head["fingerprint"]
    for name in sorted(current.keys() | saved.keys()):
        if current.get(name) != saved.get(name):
            raise ResumeMismatch(
                f"{name} is {current.get(name)}, in {directory.checkpoint} it was "
                f"{saved.get(name)}: a resumed fleet must keep it"
            )
    for name, digest in head["digests"].items():
        if name not in members:
            raise ResumeMismatch(f"tenant {name} is no longer there: a resumed fleet must keep it")
        if members[name].digest != digest:
            raise ResumeMismatch(
                f"tenant {name} has other options or data than in {directory.checkpoint}: "
                "a resumed fleet must keep them"
            )


def _write_options(
    directory: FleetDirectory,
    config: FleetConfig,
    tenants: Sequence[Tenant],
    base: Base,
    size: int,
    capacity: int,
) -> None:
    record = {
        "asked": asdict(config),
        "run": _fingerprint(config, base, capacity),
        "tenants": len(tenants),
        "parameters": size,
        "environment": describe(base.device),
    }
    text = json.dumps(record, indent=2, sort_keys=True, default=str) + "\n"
    write_atomically(directory.options, [text.encode()])
