"""What one request's adapter does never reaches another's tokens, nor outlives the request."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.adapters.bank import AdapterBank
from shoal.adapters.library import AdapterInfo
from shoal.server.assemble import assemble
from shoal.server.config import ServeConfig
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.errors import EngineFailure, ShoalError
from shoal.server.http.services import Services

pytestmark = pytest.mark.usefixtures("own_cache")

Make = Callable[..., Any]
PROMPT = list(range(40, 61))


def settings(base: Any, folder: Path, **change: Any) -> ServeConfig:
    fields: dict[str, Any] = {
        "model": str(base.path),
        "registry": f"sqlite:///{folder / 'registry.db'}",
        "device": "cpu",
        "basis_rank": 16,
        "max_model_len": 128,
        "block_size": 4,
        "max_num_seqs": 24,
        "max_num_batched_tokens": 32,
        "kv_cache_memory": 8 << 20,
        "adapter_memory": 32 << 20,
    }
    return ServeConfig(**(fields | change))


async def generate(
    services: Services, info: AdapterInfo | None, name: str, tokens: int = 10
) -> list[int] | ShoalError:
    """Tokens, or the error that ended the request."""
    spec = services.library.stage(info) if info else None
    request = Request(
        id=name,
        prompt_ids=tuple(PROMPT),
        sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        adapter=spec,
    )
    try:
        return [t async for event in services.engine.generate(request) for t in event.token_ids]
    except ShoalError as error:
        return error
    finally:
        if spec:
            services.library.unstage(spec)


def together(
    services: Services, infos: list[AdapterInfo | None], rounds: int = 1
) -> list[list[int] | ShoalError]:
    """All at once, as often as asked; then nothing is pinned or used any more."""

    async def run() -> list[list[int] | ShoalError]:
        await services.engine.start()
        try:
            got: list[list[int] | ShoalError] = []
            for turn in range(rounds):
                got += await asyncio.gather(
                    *(generate(services, info, f"{turn}-{i}") for i, info in enumerate(infos))
                )
            return got
        finally:
            await services.engine.stop()

    got = asyncio.run(run())
    host = services.library._host  # type: ignore[attr-defined]
    host.check()
    assert host.pinned_bytes == 0
    assert services.engine.stats().kv_blocks_used == 0
    return got


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_overflow_fail_alone(
    dtype: str, tiny: Any, make_adapter: Make, tmp_path: Path
) -> None:
    sane = [make_adapter("lora_xs", 4, 1), make_adapter("miss", 7, 2), make_adapter("lora", 3, 3)]
    huge = [
        make_adapter("foreign_xs", 4, 4, strength=1e30),
        make_adapter("compact_xs", 4, 5, strength=1e30),
        make_adapter("miss", 7, 6, strength=1e36),
        make_adapter("lora", 3, 7, strength=1e30),
    ]
    # What a batch of sane requests gives is what they must get beside the others.
    with assemble(settings(tiny, tmp_path, dtype=dtype)) as services:
        good: list[AdapterInfo | None] = [None]
        good += [services.library.upload(f"sane{i}", a.files) for i, a in enumerate(sane)]
        expected = together(services, good)
    with assemble(settings(tiny, tmp_path, dtype=dtype)) as services:
        bad = [services.library.upload(f"huge{i}", a.files) for i, a in enumerate(huge)]
        # Twice: the second time after blocks that the failed ones wrote.
        got = together(services, [*bad, *good, *bad], rounds=2)
    per_round = len(got) // 2
    for turn in (got[:per_round], got[per_round:]):
        assert all(isinstance(outcome, EngineFailure) for outcome in turn[:4] + turn[8:])
        assert turn[4:8] == expected
    if dtype == "float32":
        deltas = [None, *(a.deltas for a in sane)]
        assert expected == [tiny.greedy(PROMPT, 10, delta) for delta in deltas]


def test_a_bank_with_room_for_few_serves_many(
    tiny: Any, make_adapter: Make, tmp_path: Path
) -> None:
    kinds = [("lora_xs", 4), ("miss", 7), ("lora", 3), ("lora", 9), ("compact_xs", 8)] * 2
    adapters = [make_adapter(kind, rank, seed) for seed, (kind, rank) in enumerate(kinds)]
    capacity = 72 << 10  # the largest and some small ones: nearly every admission evicts another
    with assemble(settings(tiny, tmp_path, adapter_memory=capacity)) as services:
        infos = [services.library.upload(f"a{i}", a.files) for i, a in enumerate(adapters)]
        sizes = [info.packed_elements * 4 for info in infos]
        assert max(sizes) < capacity < sum(sizes) / 2
        got = together(services, [None, *infos], rounds=2)
        assert services.engine.stats().adapters_resident < len(infos)
    expected = [tiny.greedy(PROMPT, 10), *(tiny.greedy(PROMPT, 10, a.deltas) for a in adapters)]
    assert got == expected * 2


def test_a_load_that_fails_costs_its_step_and_is_made_good(
    tiny: Any, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter("lora", 4, 1)
    load, failures = AdapterBank.load, [RuntimeError("no memory")]

    def load_or_fail(*args: Any) -> None:
        if failures:
            raise failures.pop()
        load(*args)

    monkeypatch.setattr(AdapterBank, "load", load_or_fail)
    with assemble(settings(tiny, tmp_path)) as services:
        info = services.library.upload("a", adapter.files)
        failed, got = together(services, [info], rounds=2)
    assert isinstance(failed, EngineFailure)
    assert got == tiny.greedy(PROMPT, 10, adapter.deltas)
