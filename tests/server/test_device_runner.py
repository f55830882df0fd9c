"""The GPU's runner against the plain one: same scheduler, same requests, same tokens.

On a CPU the fused kernels run their references and nothing is captured; on a GPU the same tests
hold compiled kernels, graphs and asynchronous steps to the CPU's tokens in float32.
"""

import gc
import random
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families import core, fold, lora, scale
from shoal.adapters.host_tier import HostTier
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import UNIT_ELEMENTS, AdapterSpec, BaseShape, Section
from shoal.adapters.tables import ActiveFamilies
from shoal.server.engine.plan import DeviceLost, Pending, Runner, StepPlan
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.model import graphs
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder
from shoal.server.model.device_runner import DeviceRunner, RunnerLimits, _Captured, _Step
from shoal.server.model.dummy import random_decoder
from shoal.server.model.fused import defers_norms
from shoal.server.model.gemms import SPARE_ROWS
from shoal.server.model.graphs import NO_FAMILIES, GraphKey
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.runner import ModelRunner
from shoal.server.model.sampler import Sampler
from shoal.server.model.starting import (
    USUAL_SIZES,
    plan_graphs,
    prompt_steps,
    start_device_runner,
)
from shoal.server.model.step_tensors import Layout

VOCAB = 211
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LIMITS = RunnerLimits(max_num_seqs=20, max_num_batched_tokens=48, max_model_len=96)
BLOCK_TOKENS, NUM_BLOCKS = 4, 400
KINDS: list[tuple[str, int, str | None]] = [
    *(("core", rank, "canonical") for rank in (4, 8, 16, 24, 32, 40)),
    *(("core", rank, "foreign") for rank in (8, 12)),
    ("core", 20, "late"),  # no columns are left for its basis
    *(("fold", rank, None) for rank in (4, 7, 16)),
    *(("lora", rank, None) for rank in (3, 16, 24)),
]
# Of LoRA adapters: what comes before their own section. The first is fused, the second wide.
EXTRA: list[tuple[int, Section]] = [
    (8, Section("core", 16, 0, "canonical")),
    (3, Section("core", 20, 0, "late")),
    *((rank, Section("scale", 0)) for rank in (5, 16)),
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


class World:
    """One tiny model and its adapters, on one device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.config = ModelConfig.from_hf(CONFIG)
        self.shape: BaseShape = self.config.base_shape("tiny", "0" * 64)
        source = random_decoder(self.config, "cpu", torch.float32)
        self.decoder = Decoder(self.config, device=self.device, dtype=dtype, spare_rows=SPARE_ROWS)
        for name, view in source._views.items():
            # Large enough that a mistake changes tokens.
            self.decoder.load_weight(name, view if "norm" in name else view * 3)
        self.packed = adapters(self.shape, dtype)
        self.host = HostTier(64 << 20)
        for packed in self.packed:
            self.host.put(packed)

    def cache(self) -> KVCache:
        return KVCache(
            self.config,
            num_blocks=NUM_BLOCKS,
            block_tokens=BLOCK_TOKENS,
            device=self.device,
            dtype=self.dtype,
        )

    def bank(self, *, joint: bool) -> AdapterBank:
        bank = AdapterBank(
            self.shape, capacity_bytes=16 << 20, device=self.device, dtype=self.dtype, joint=joint
        )
        for basis in bases(self.shape, self.dtype):
            bank.add_basis(basis)
        return bank

    def plain(self) -> tuple[Runner, AdapterBank]:
        bank = self.bank(joint=False)
        return ModelRunner(self.decoder, self.cache(), bank, self.host, Sampler()), bank

    def fused(self) -> tuple[DeviceRunner, AdapterBank]:
        bank = self.bank(joint=defers_norms(self.config, self.dtype))
        runner = start_device_runner(self.decoder, self.cache(), bank, self.host, LIMITS)
        runner.graphs.record_after = 1  # so that what is tested is what was recorded
        return runner, bank


def bases(shape: BaseShape, dtype: torch.dtype) -> Iterator[Basis]:
    generator = torch.Generator().manual_seed(3)
    for name, rank in (("canonical", 48), ("foreign", 12), ("second", 16), ("late", 20)):
        factors = {}
        for target in shape.targets():
            dims = shape.dims[target.module]
            noise = torch.randn(dims.d_out, min(rank, *dims), generator=generator)
            factors[target] = torch.linalg.qr(noise)[0].to(dtype).float()
        kind = "canonical" if name == "canonical" else "uploaded"
        yield Basis(id=name, rank=rank, factors=factors, kind=kind)


def adapters(shape: BaseShape, dtype: torch.dtype) -> list[PackedAdapter]:
    generator = torch.Generator().manual_seed(4)
    layouts = {
        "core": core.packed_elements,
        "fold": fold.packed_elements,
        "lora": lora.packed_elements,
        "scale": lambda shape, rank: scale.packed_elements(shape),
    }
    strengths = {"core": 1.0, "fold": 0.05, "lora": 0.15, "scale": 0.3}
    made: list[PackedAdapter] = []

    def draw(kind: str, rank: int) -> torch.Tensor:
        elements = layouts[kind](shape, rank)
        return torch.randn(elements, generator=generator) * strengths[kind]

    def add(data: torch.Tensor, family: str, rank: int, basis_id: str | None, *rest: Any) -> None:
        spec = AdapterSpec(f"{len(made):064x}", family, rank, basis_id, len(data), *rest)  # type: ignore[arg-type]
        made.append(PackedAdapter(spec, data.to(dtype)))

    for family, rank, basis_id in KINDS * 2:
        add(draw(family, rank), family, rank, basis_id)
    for rank, section in EXTRA * 2:
        before = draw(section.kind, section.rank)
        unit = -(-len(before) // UNIT_ELEMENTS)
        gap = torch.zeros(unit * UNIT_ELEMENTS - len(before))
        own = draw("lora", rank)
        add(torch.cat([before, gap, own]), "lora", rank, None, (section,), unit)
    return made


def workload(
    specs: Sequence[AdapterSpec], *, count: int = 30, seed: int = 0, **sampling: Any
) -> list[Request]:
    draw = random.Random(seed)
    requests = []
    for i in range(count):
        prompt = tuple(draw.randrange(3, VOCAB) for _ in range(draw.choice((1, 3, 9, 30, 61))))
        params: dict[str, Any] = {
            "max_tokens": draw.randint(1, 16),
            "temperature": 0.0,
            "ignore_eos": True,
        }
        params["seed"] = i
        requests.append(
            Request(
                id=str(i),
                prompt_ids=prompt,
                sampling=SamplingParams(**(params | sampling)),
                adapter=draw.choice([None, *specs]),
            )
        )
    return requests


def new_scheduler(bank: AdapterBank, waiting: int) -> Scheduler:
    limits = SchedulerLimits(
        block_tokens=BLOCK_TOKENS,
        num_blocks=NUM_BLOCKS,
        max_num_seqs=LIMITS.max_num_seqs,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        max_model_len=LIMITS.max_model_len,
        max_waiting=waiting,
        vocab_size=VOCAB,
    )
    return Scheduler(limits, SlotTable(bank.num_units, UNIT_ELEMENTS), frozenset({2}))


def run(
    runner: Runner, bank: AdapterBank, requests: Sequence[Request], *, arriving: int = 3
) -> dict[str, list[int]]:
    """Every request to its end, ``arriving`` more at each step, as ``EngineLoop`` does it."""
    scheduler = new_scheduler(bank, len(requests))
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    todo = list(requests)
    flight: list[tuple[StepPlan, Pending]] = []
    while todo or scheduler.has_work:
        for request in todo[:arriving]:
            refused = scheduler.add(request)
            assert refused is None
        todo = todo[arriving:]
        plan = scheduler.plan()
        if plan is not None:
            flight.append((plan, runner.submit(plan)))
        if flight and (plan is None or not runner.lookahead or len(flight) > 1):
            landed, pending = flight.pop(0)
            for event in scheduler.commit(landed, pending.wait()):
                assert event.error is None, event.error
                tokens[event.request_id] += event.token_ids
    return tokens


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    world = World("cpu")
    runner, bank = world.plain()
    return run(runner, bank, workload([packed.spec for packed in world.packed]))


@pytest.mark.parametrize("captured", [1024, 16])
@pytest.mark.parametrize("device", DEVICES)
def test_mixed_batches_equal_the_plain_runner(
    device: str, captured: int, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every step has a graph, and where those with more than 16 prompt tokens have none."""
    sizes = tuple(size for size in graphs.CHUNK_TOKENS if size <= captured)
    monkeypatch.setattr(graphs, "CHUNK_TOKENS", sizes)
    world = World(device)
    runner, bank = world.fused()
    got = run(runner, bank, workload([packed.spec for packed in world.packed]))
    assert got == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > 12, "the model says nothing"


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_count_gives_the_same_tokens(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around every bucket edge: a request's tokens do not depend on how many run beside it."""
    counts: Sequence[int] = (9, 3, 1)
    if device == "cuda":
        here = sys.modules[__name__]
        monkeypatch.setattr(here, "NUM_BLOCKS", 1200)
        monkeypatch.setattr(
            here,
            "LIMITS",
            RunnerLimits(max_num_seqs=256, max_num_batched_tokens=512, max_model_len=96),
        )
        buckets = graphs.row_buckets(256)
        counts = sorted({min(n + d, 256) for n in buckets for d in (0, 1)}, reverse=True)
    world = World(device)
    specs = [packed.spec for packed in world.packed]
    runner, bank = world.fused()
    alone: dict[str, list[int]] = {}
    for count in counts:
        requests = [
            Request(
                id=str(i),
                prompt_ids=(3 + i % 200, 7),
                sampling=SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True),
                adapter=None if i % 3 == 0 else specs[i % len(specs)],
            )
            for i in range(count)
        ]
        got = run(runner, bank, requests, arriving=count)
        for name, tokens in got.items():
            assert alone.setdefault(name, tokens) == tokens


@pytest.mark.parametrize("device", DEVICES)
def test_seeded_requests_draw_the_plain_runners_tokens(device: str) -> None:
    host, world = World("cpu"), World(device)
    specs = [packed.spec for packed in world.packed]
    for sampling in (
        {"temperature": 0.8},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.8},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.7, "presence_penalty": 0.5, "logprobs": 2},
    ):
        requests = workload(specs, count=8, seed=1, max_tokens=6, **sampling)
        assert run(*world.fused(), requests) == run(*host.plain(), requests)


@pytest.mark.parametrize("device", DEVICES)
def test_non_finite_logits_fail_their_row_only(device: str) -> None:
    world = World(device)
    runner, bank = world.fused()
    bad = Request(
        id="bad",
        prompt_ids=(5, 6, 7),
        sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
    )
    good = Request(id="good", prompt_ids=(8, 9), sampling=bad.sampling)
    alone = run(runner, bank, [good])
    with torch.no_grad():
        world.decoder.embed[7] = float("nan")
    scheduler = new_scheduler(bank, 4)
    assert scheduler.add(bad) is None
    assert scheduler.add(good) is None
    tokens: list[int] = []
    failed: list[str] = []
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None
        for event in scheduler.commit(plan, runner.submit(plan).wait()):
            if event.error is not None:
                failed.append(event.request_id)
            else:
                tokens += event.token_ids
    assert failed == ["bad"]
    assert tokens == alone["good"]


@pytest.mark.parametrize("sampling", [{}, {"logprobs": 1}], ids=["kernel", "host"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_that_fails_while_the_next_step_is_planned_harms_nobody(
    device: str, sampling: dict[str, Any]
) -> None:
    """The younger plan still holds the failed row, whose token nobody knows: it must be a token."""
    world = World(device)
    runner, bank = world.fused()
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, **sampling)
    good = Request(id="good", prompt_ids=(8, 9), sampling=params)
    alone = run(runner, bank, [good])
    with torch.no_grad():
        world.decoder.embed[7] = float("nan")
    scheduler = new_scheduler(bank, 4)
    for request in (Request(id="bad", prompt_ids=(5, 6, 7), sampling=params), good):
        assert scheduler.add(request) is None
    tokens: list[int] = []
    failed: list[str] = []
    flight: list[tuple[StepPlan, Pending]] = []
    while scheduler.has_work:
        plan = scheduler.plan()
        if plan is not None:
            flight.append((plan, runner.submit(plan)))
        if plan is None or len(flight) > 1:
            landed, pending = flight.pop(0)
            for event in scheduler.commit(landed, pending.wait()):
                if event.error is not None:
                    failed.append(event.request_id)
                else:
                    tokens += event.token_ids
    assert failed == ["bad"]
    assert tokens == alone["good"]


@pytest.mark.parametrize("lost", [True, False])
def test_only_an_error_that_leaves_nothing_usable_loses_the_device(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def synchronize(self) -> None:
            raise RuntimeError("planted")

    synchronize = Failing().synchronize if lost else lambda: None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    step = _Step({}, torch.zeros(1), Failing())  # type: ignore[arg-type]
    with pytest.raises(DeviceLost if lost else RuntimeError):
        step.wait()


def test_steps_that_only_compile_read_and_write_nothing() -> None:
    world = World("cpu")
    runner, _ = world.fused()
    for chunks, tokens in prompt_steps(LIMITS):
        runner.warm_prompts(tokens=(tokens,), chunks=chunks)
    assert not runner._kv._data.any()


class Replayed:
    """Stands in for CUDA's graphs: what a step makes lies where its first run put it."""

    def __init__(self, runner: DeviceRunner) -> None:
        self.runner = runner
        self.tried: list[GraphKey] = []
        runner.graphs.enabled = True
        runner._capture = self.capture  # type: ignore[method-assign]

    def capture(self, key: GraphKey) -> _Captured:
        self.tried.append(key)
        last = self.runner._last.clone()
        captured = self.runner._run(key)
        self.runner._last.copy_(last)

        class Graph:
            def replay(_) -> None:
                again = self.runner._run(key)
                captured.tokens.copy_(again.tokens)
                if captured.scale is not None and again.scale is not None:
                    captured.scale.sums.copy_(again.scale.sums)

        captured = captured._replace(graph=Graph())  # type: ignore[arg-type]
        self.runner.graphs.add(key, captured)
        return captured


def test_only_a_runner_that_replays_asks_for_bursts_to_be_spread() -> None:
    runner, _ = World("cpu").fused()
    assert runner.recorded_prompts is None
    runner.graphs.enabled = True
    recorded = runner.recorded_prompts
    assert recorded is not None
    prompts, tokens = recorded
    layout = runner.sizes.layout
    assert layout(Layout(1, prompts, tokens), all_sample=True) is not None
    assert layout(Layout(1, prompts + 1, tokens), all_sample=True) is None
    assert layout(Layout(1, prompts, tokens + 1), all_sample=True) is None
    runner._attention = lambda *_, **__: None  # type: ignore[assignment,return-value]
    assert runner.recorded_prompts is None


def test_every_prompt_graph_is_planned_and_the_usual_ones_first() -> None:
    runner, _ = World("cpu").fused()
    now, later = (ActiveFamilies(core_columns=16, core_alignment=align) for align in (8, 1))
    usual = plan_graphs(runner, (now,), (later,))
    planned, sizes = runner.graphs.planned, runner.sizes
    assert set(planned) == {
        *sizes.prompt_keys((NO_FAMILIES, now, later)),
        *sizes.decode_keys((later,)),
    }
    assert len(planned) == len(set(planned))
    assert {key.active for key in planned[:usual]} == {NO_FAMILIES, now}
    first, then = ({key.layout.chunk_tokens for key in each} for each in (planned[:usual], planned))
    assert first == set(sorted(then - {0})[:USUAL_SIZES])


def test_a_runner_goes_with_its_last_reference() -> None:
    """And its memory on the device with it: the next one must not wait for a collection."""
    runner, _ = World("cpu").fused()
    there = weakref.ref(runner)
    gc.collect()  # what compiling and other tests left
    gc.disable()
    try:
        del runner
        assert there() is None
    finally:
        gc.enable()


def test_clients_cannot_have_graphs_without_end(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "GRAPHS_MAX", 5)
    world = World("cpu")
    runner, bank = world.fused()
    replayed = Replayed(runner)
    assert run(runner, bank, workload([packed.spec for packed in world.packed])) == expected
    assert len(runner.graphs) == len(replayed.tried) == 5


def test_what_is_wanted_rarely_is_run_and_not_recorded(
    expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "GRAPHS_MAX", 5)
    world = World("cpu")
    runner, bank = world.fused()
    runner.graphs.record_after = 4
    replayed, wanted = Replayed(runner), Counter[GraphKey]()
    replay = runner._replay

    def counted(key: GraphKey) -> _Captured:
        wanted[key] += 1
        assert (key in replayed.tried) <= (wanted[key] > 4)
        assert runner.graphs.num_wanted <= 5, "counted without end"
        return replay(key)

    runner._replay = counted  # type: ignore[method-assign]
    assert run(runner, bank, workload([packed.spec for packed in world.packed])) == expected
    assert 0 < len(replayed.tried) < len(wanted)


def test_nothing_is_prepared_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = World("cpu").fused()
    replayed = Replayed(runner)
    runner.graphs.plan(runner.sizes.prompt_keys((NO_FAMILIES,)))
    with monkeypatch.context() as patch:
        patch.setattr(runner.graphs, "_is_full", lambda: True)
        assert not runner.prepare()
    assert not replayed.tried
    assert runner.prepare()


def test_what_was_prepared_is_replayed_for_any_rows(expected: dict[str, list[int]]) -> None:
    world = World("cpu")
    runner, bank = world.fused()
    specs = [packed.spec for packed in world.packed]
    assert run(runner, bank, workload(specs)) == expected  # so that old tables are there
    replayed = Replayed(runner)
    runner.graphs.record_after = sys.maxsize
    active = ActiveFamilies(core_columns=16, core_alignment=8)
    runner.graphs.plan(runner.sizes.prompt_keys((active, NO_FAMILIES)))
    count = 0
    while runner.prepare():
        count += 1
    assert count == len(replayed.tried) == len(set(replayed.tried))
    assert {key.active for key in replayed.tried} == {active, NO_FAMILIES}
    assert {key.layout for key in replayed.tried} == {
        Layout(rows, graphs.CHUNKS, tokens)
        for rows in runner.sizes.chunk_buckets
        for tokens in graphs.CHUNK_TOKENS
    }
    assert run(runner, bank, workload(specs)) == expected
    # What was wanted meanwhile, and was not recorded while others waited, is now.
    wanted = runner.graphs.num_wanted
    assert wanted > 0
    while runner.prepare():
        count += 1
    assert count == len(replayed.tried)
    assert not runner.graphs.num_wanted
    assert run(runner, bank, workload(specs)) == expected


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("place", ["_rehearse", "_capture"])
def test_no_memory_in_an_idle_moment_ends_preparing_alone_and_a_lost_context_is_noticed(
    place: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = World("cpu").fused()
    runner.graphs.enabled = True
    runner.graphs.plan(runner.sizes.prompt_keys((NO_FAMILIES,)))

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(runner, place, fail)
    monkeypatch.setattr(runner.graphs, "_is_full", lambda: False)
    monkeypatch.setattr(runner, "_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail if lost else lambda *_: None)
    if lost:
        with pytest.raises(DeviceLost):
            runner.prepare()
        return
    if place == "_capture":
        monkeypatch.setattr(runner, "_rehearse", lambda key: None)
    assert runner.prepare()
    assert not runner.prepare()
    assert not len(runner.graphs)


def test_a_capture_that_fails_costs_the_graph_and_not_the_step(
    expected: dict[str, list[int]],
) -> None:
    world = World("cpu")
    runner, bank = world.fused()
    replayed = Replayed(runner)

    def capture(key: GraphKey) -> _Captured:
        if len(replayed.tried) == 3:
            raise torch.OutOfMemoryError("planted")
        return replayed.capture(key)

    runner._capture = capture  # type: ignore[method-assign]
    assert run(runner, bank, workload([packed.spec for packed in world.packed])) == expected
    assert len(runner.graphs) == 3


@pytest.mark.parametrize("fault", ["memory", "not allowed"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_capture_that_fails_half_way_harms_no_step(
    fault: str, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an idle moment; the steps after it neither allocate from nor record to what it left."""
    world = World("cuda")
    runner, bank = world.fused()
    active = ActiveFamilies(core_columns=16, core_alignment=8)
    runner.graphs.plan(runner.sizes.prompt_keys((active,)))
    there, run_step = len(runner.graphs), runner._run

    def fail(key: GraphKey, layers: Sequence[int] | None = None) -> _Captured:
        made = run_step(key, layers)
        if torch.cuda.is_current_stream_capturing():
            if fault == "memory":
                torch.empty(1 << 50, device="cuda")
            torch.cuda.synchronize()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_run", fail)
        assert runner.prepare()
    # PyTorch's own random numbers, which steps do not use and other tests do, wait for its end.
    fresh = torch.Generator("cuda").graphsafe_get_state()
    torch.cuda.default_generators[0].graphsafe_set_state(fresh)
    assert not runner.prepare(), "none is tried any more"
    assert len(runner.graphs) == there
    assert run(runner, bank, workload([packed.spec for packed in world.packed])) == expected


def test_a_step_that_fails_before_its_capture_costs_no_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World("cpu")
    runner, bank = world.fused()
    Replayed(runner)

    def fail(*_: object) -> _Captured:
        raise RuntimeError("planted")

    good, bad = workload([], count=2, seed=5)
    scheduler = new_scheduler(bank, 1)
    assert scheduler.add(bad) is None
    plan = scheduler.plan()
    assert plan is not None
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_run", fail)
        with pytest.raises(RuntimeError, match="planted"):
            runner.submit(plan)
    run(runner, bank, [good])
    assert len(runner.graphs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sixteen_bit_logprobs_are_near_the_cpus(dtype: torch.dtype) -> None:
    world, host = World("cuda", dtype), World("cpu")
    got_from, want_from = world.fused(), host.plain()
    for packed in (None, *world.packed):
        spec = None if packed is None else packed.spec
        got, want = top_logprobs(*got_from, spec), top_logprobs(*want_from, spec)
        common = got.keys() & want.keys()
        assert len(common) >= 14, spec
        assert max(abs(got[token] - want[token]) for token in common) < 0.25, spec


def top_logprobs(runner: Runner, bank: AdapterBank, spec: AdapterSpec | None) -> dict[int, float]:
    """The 20 best of the first sampled position."""
    prompt = tuple(random.Random(0).randrange(3, VOCAB) for _ in range(40))
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    scheduler = new_scheduler(bank, 1)
    request = Request(id="r", prompt_ids=prompt, sampling=sampling, adapter=spec)
    assert scheduler.add(request) is None
    plan = scheduler.plan()
    assert plan is not None
    (event,) = scheduler.commit(plan, runner.submit(plan).wait())
    assert event.error is None, event.error
    return dict(event.logprobs[0].top)
