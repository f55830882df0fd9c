"""Building a ``DeviceRunner`` that will not stop to compile, measure or capture once it serves.

One place for what the server and the offline benchmark share: GEMM plan, kernels, graphs.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from shoal.adapters.bank import AdapterBank
from shoal.adapters.families.joint_basis import Columns, JointBasis
from shoal.adapters.host_tier import HostTier
from shoal.adapters.spec import GROUPS
from shoal.adapters.tables import ActiveFamilies
from shoal.kernels.ahead import compiling_ahead
from shoal.kernels.paged_attention.launches import row_class, split_spans
from shoal.server.model import gemms
from shoal.server.model.decoder import Decoder, Linear
from shoal.server.model.device_runner import DeviceRunner, RunnerLimits, StepBackend
from shoal.server.model.fused import FusedForward
from shoal.server.model.graphs import CHUNK_TOKENS, NO_FAMILIES, RECORD_AFTER, ends, row_buckets
from shoal.server.model.kv_cache import KVCache

log = logging.getLogger(__name__)

# Steps of up to this many tokens make gate_up's h beside the GEMM where that is faster.
BESIDE_ROWS = 256
PROMPT_ROWS = (512, 1024, 2048)
# Token counts of prompt steps that together launch every variant of the kernels: a kernel is
# compiled anew for sizes of 1, for sizes that 16 divides, and for each size of its tiles.
WARM_TOKENS = (1, 17, 32, 96, 192, 513, 1024)
# Chunks of at most this many tokens on average may be taken in smaller tiles of queries.
SHORT_CHUNK = 64

# Of the sizes of prompts in a step that have graphs, so many have them when the server starts to
# serve: what a request adds to the steps of others in streams is mostly little. The rest follows in
# idle moments.
USUAL_SIZES = 2

# (what is being done, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]


def start_device_runner(
    decoder: Decoder,
    kv: KVCache,
    bank: AdapterBank | None,
    host: HostTier | None,
    limits: RunnerLimits,
    *,
    families: Sequence[ActiveFamilies] = (),
    later: Sequence[ActiveFamilies] = (),
    compiled: Sequence[ActiveFamilies] = (),
    attention: StepBackend | None = None,
    progress: Progress | None = None,
) -> DeviceRunner:
    """A runner with its GEMMs measured, its kernels compiled and its graphs captured.

    Args:
        decoder: with ``gemms.SPARE_ROWS`` spare rows when there is a bank.
        bank: None for the base alone.
        families: sets of active families whose graphs are captured now, besides the base's.
        later: sets whose kernels are compiled now, and whose graphs are captured in idle moments.
        compiled: further sets whose kernels are compiled now, and whose graphs are captured when a
            step first needs them.
        attention: see ``DeviceRunner``.
        progress: told of each part of the work.
    """

    def part(name: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(name, done, total) if progress else None

    on_cuda = decoder.device.type == "cuda"
    sets = (NO_FAMILIES, *families)
    every = (*sets, *later)
    begin = time.perf_counter()
    plan = measure_gemms(decoder, limits, every, part("measuring GEMMs"))
    measured = time.perf_counter()
    runner = make_device_runner(decoder, kv, bank, host, limits, plan, attention)
    if on_cuda:
        compiling = part("compiling kernels")
        usual = plan_graphs(runner, families, later) if attention is None else 0
        # Every kernel is met once without being launched, for all to be compiled at once.
        with compiling_ahead(compiler_threads()) as ahead:
            if ahead:
                meet(runner, sets, later, compiled, lambda n, total: compiling(n, 2 * total))
        rehearse(runner, every, compiled, lambda n, total: compiling(total + n, 2 * total))
        warmed = time.perf_counter()
        if attention is None:
            runner.capture(sets, part("capturing graphs"))
            runner.capture(compiled, buckets=ends(runner.sizes.buckets))
            recording = part("capturing graphs of prompts")
            for done in range(usual):
                recording(done, usual)
                runner.prepare()
            recording(usual, usual)
        log.info(
            "device runner ready gemms_s=%.1f kernels_s=%.1f graphs_s=%.1f graphs=%d free=%d",
            measured - begin,
            warmed - measured,
            time.perf_counter() - warmed,
            len(runner.graphs),
            torch.cuda.mem_get_info(decoder.device)[0],
        )
    runner.graphs.record_after = RECORD_AFTER
    return runner


def plan_graphs(
    runner: DeviceRunner, families: Sequence[ActiveFamilies], later: Sequence[ActiveFamilies]
) -> int:
    """Plan the graphs of steps with prompts for the base and ``families``, and all of ``later``.

    Returns:
        How many of them, the first ones, are to be captured before the runner serves.
    """
    ordered = (*families[:1], NO_FAMILIES, *families[1:])
    graphs, sizes = runner.graphs, runner.sizes
    usual = sizes.prompt_keys(ordered, CHUNK_TOKENS[:USUAL_SIZES])
    graphs.plan(usual)
    graphs.plan(sizes.prompt_keys(ordered, CHUNK_TOKENS[USUAL_SIZES:]))
    for active in later:
        graphs.plan(sizes.decode_keys((active,)))
        graphs.plan(sizes.prompt_keys((active,)))
    return len(usual)


def meet(
    runner: DeviceRunner,
    sets: Sequence[ActiveFamilies],
    later: Sequence[ActiveFamilies],
    compiled: Sequence[ActiveFamilies],
    progress: Callable[[int, int], None],
) -> None:
    """Run steps that together launch every variant of every kernel: those without graphs, and those
    that are, or may be, captured."""
    rehearse(runner, (*sets, *later), compiled, progress)
    runner.rehearse(sets)
    runner.rehearse_ends(compiled)


def rehearse(
    runner: DeviceRunner,
    sets: Sequence[ActiveFamilies],
    compiled: Sequence[ActiveFamilies],
    progress: Callable[[int, int], None],
) -> None:
    """Run steps without graphs that together launch every variant of the kernels they need."""
    limits = runner.limits
    most = limits.max_num_batched_tokens
    tokens = [count for count in WARM_TOKENS if count <= most]
    for done, count in enumerate(tokens):
        progress(done, len(tokens))
        runner.warm_prompts((*sets, *compiled), tokens=(count,))
    for chunks in {1, limits.max_num_seqs}:  # between them the fewest and most tiles of tokens
        runner.warm_prompts(compiled, tokens=(most,), chunks=chunks)
    for chunks, count in prompt_steps(limits):
        runner.warm_prompts(tokens=(count,), chunks=chunks)
    runner.warm_decodes(split_spans(limits.max_model_len))
    progress(len(tokens), len(tokens))


def compiler_threads() -> int:
    """Threads that compile kernels: each needs a core, and some hundred MB."""
    return min(16, len(os.sched_getaffinity(0)))


def prompt_steps(limits: RunnerLimits) -> list[tuple[int, int]]:
    """Numbers of prompts and of their tokens that together launch every variant of prefill."""
    most = limits.max_num_seqs
    fewest = {row_class(rows): rows for rows in range(most, 0, -1)}.values()
    steps = [(rows, rows * each) for rows in fewest for each in (1, SHORT_CHUNK + 1)]
    return [(rows, min(tokens, limits.max_num_batched_tokens)) for rows, tokens in steps]


def measure_gemms(
    decoder: Decoder,
    limits: RunnerLimits,
    families: Sequence[ActiveFamilies],
    progress: Callable[[int, int], None] | None = None,
) -> gemms.GemmPlan:
    """How to run the GEMMs of steps with these sets of families; empty on a CPU."""
    if decoder.device.type != "cuda":
        return gemms.NO_PLAN
    rows = row_buckets(limits.max_num_seqs)
    return gemms.measure(
        decoder,
        (*rows, *(count for count in PROMPT_ROWS if count > rows[-1])),
        sorted({active.core_columns for active in families}),
        beside=("gate_up",),
        beside_rows=BESIDE_ROWS,
        progress=progress,
    )


def make_device_runner(
    decoder: Decoder,
    kv: KVCache,
    bank: AdapterBank | None,
    host: HostTier | None,
    limits: RunnerLimits,
    plan: gemms.GemmPlan,
    attention: StepBackend | None = None,
) -> DeviceRunner:
    """A runner that compiles and captures what it needs when it first needs it."""
    joint = None if bank is None else bank.joint
    if joint is not None:
        joint.watch(partial(_widen, decoder, joint))
    forward = FusedForward(
        decoder,
        kv,
        basis_rows=None if joint is None else joint.rows_of,
        gemms=plan,
        max_positions=limits.max_model_len,
    )
    return DeviceRunner(forward, kv, bank, host, limits=limits, attention=attention)


def _widen(decoder: Decoder, joint: JointBasis, columns: Columns) -> None:
    """Write the rows of new columns behind every weight; they are multiplied by nobody yet."""
    for layer in decoder.layers:
        for group, modules in GROUPS.items():
            linear: Linear = getattr(layer, group)
            rows = joint.widened_rows(linear.layer, group, linear.weight, columns)
            first = linear.weight.shape[0] + len(modules) * columns.first
            linear.widened[first : first + len(rows)].copy_(rows)
