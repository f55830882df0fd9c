"""The whole engine against naive generation with merged weights (fp32, greedy, exact ids)."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal.adapters.library import AdapterInfo
from shoal.server.assemble import assemble
from shoal.server.config import ServeConfig
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.http.services import Services

pytestmark = pytest.mark.usefixtures("own_cache")

Make = Callable[..., object]

KINDS = [
    ("lora_xs", 4),
    ("lora_xs", 9),
    ("foreign_xs", 5),
    ("miss", 8),
    ("miss", 7),  # divides neither 48 nor 80
    ("mini", 6),
    ("lora", 3),
    ("lora", 16),
]


def config(tiny: object, folder: Path, **change: object) -> ServeConfig:
    fields = {
        "model": str(tiny.path),  # type: ignore[attr-defined]
        "registry": f"sqlite:///{folder / 'registry.db'}",
        # On a card: SHOAL_TEST_DEVICE=cuda, for the plain and the fused runner.
        "device": os.environ.get("SHOAL_TEST_DEVICE", "cpu"),
        "dtype": "float32",
        "gpu_memory_utilization": 0.2,
        "spectral_memory": 64 << 20,
        "basis_rank": 16,
        "max_model_len": 128,
        "block_size": 4,
        "max_num_seqs": 20,
        "max_num_batched_tokens": 24,
    }
    return ServeConfig(**(fields | change))  # type: ignore[arg-type]


@asynccontextmanager
async def running(services: Services) -> AsyncIterator[None]:
    await services.engine.start()
    try:
        yield
    finally:
        await services.engine.stop()


async def generate(
    services: Services, prompt: list[int], tokens: int, info: AdapterInfo | None, name: str
) -> list[int]:
    spec = services.library.stage(info) if info else None
    request = Request(
        id=name,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        adapter=spec,
    )
    got: list[int] = []
    try:
        async for event in services.engine.generate(request):
            got += event.token_ids
    finally:
        if spec:
            services.library.unstage(spec)
    return got


@pytest.mark.usefixtures("any_runner")
@pytest.mark.parametrize("kv_blocks", [400, 40], ids=["roomy", "preempting"])
def test_a_mixed_batch_equals_naive_generation(
    tiny: object, make_adapter: Make, tmp_path: Path, kv_blocks: int
) -> None:
    adapters = [make_adapter(kind, rank, seed) for seed, (kind, rank) in enumerate(KINDS)]
    kv_bytes = kv_blocks * 4 * 2 * 2 * 24 * 4  # blocks x tokens x k,v x layers x kv width x fp32
    with assemble(config(tiny, tmp_path, kv_cache_memory=kv_bytes)) as services:
        infos = [
            services.library.upload(f"a{i}", adapter.files)  # type: ignore[attr-defined]
            for i, adapter in enumerate(adapters)
        ]
        families = [info.family for info in infos]
        assert families == ["core"] * 3 + ["fold"] * 3 + ["lora"] * 2
        assert len({info.basis_id for info in infos}) == 3  # ours, an uploaded one, none
        rng = random.Random(5)
        shared = [rng.randrange(2, 258) for _ in range(21)]
        jobs = []
        for number in range(27):
            which = number % 9 - 1  # -1 is the base
            tail = [rng.randrange(2, 258) for _ in range(rng.randrange(0, 40))]
            prompt = shared + tail if number % 2 else [*tail, 7, 8]
            jobs.append((which, prompt, rng.randrange(4, 20)))

        async def all_at_once() -> list[list[int]]:
            async with running(services):
                return await asyncio.gather(
                    *(
                        generate(services, prompt, n, infos[which] if which >= 0 else None, str(i))
                        for i, (which, prompt, n) in enumerate(jobs)
                    )
                )

        got = asyncio.run(all_at_once())
        stats = services.engine.stats()
    for (which, prompt, n), tokens in zip(jobs, got, strict=True):
        deltas = adapters[which].deltas if which >= 0 else None  # type: ignore[attr-defined]
        assert tokens == tiny.greedy(prompt, n, deltas), (which, len(prompt))  # type: ignore[attr-defined]
    # Each way of running was really taken: reuse where there is room, preemption where not.
    assert (stats.prefix_cache_hits > 0) == (kv_blocks == 400)
    assert (stats.preemptions_total > 0) == (kv_blocks == 40)


def test_a_running_request_keeps_the_version_it_started_with(
    tiny: object, make_adapter: Make, tmp_path: Path
) -> None:
    old, new = make_adapter("lora_xs", 4, 100), make_adapter("lora", 4, 101)
    prompt = list(range(20, 50))
    with assemble(config(tiny, tmp_path)) as services:
        library = services.library
        first = library.upload("voice", old.files)  # type: ignore[attr-defined]

        async def go() -> tuple[list[int], list[int], list[int]]:
            async with running(services):
                before = asyncio.create_task(generate(services, prompt, 60, first, "old"))
                while services.engine.stats().running == 0:
                    await asyncio.sleep(0)
                second = await asyncio.to_thread(library.upload, "voice", new.files)  # type: ignore[attr-defined]
                assert not before.done()
                assert library.resolve("voice") == second
                after = await generate(services, prompt, 20, second, "new")
                back = library.resolve("voice@1")
                return await before, after, await generate(services, prompt, 20, back, "back")

        kept, after, again = asyncio.run(go())
    expected = tiny.greedy(prompt, 60, old.deltas)  # type: ignore[attr-defined]
    assert kept == expected
    assert again == expected[:20]
    assert after == tiny.greedy(prompt, 20, new.deltas)  # type: ignore[attr-defined]
    assert after != expected[:20]
