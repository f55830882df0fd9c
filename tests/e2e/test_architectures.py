"""Adapters on every kind of base, and in every form a file can have, against naive generation."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.library import AdapterInfo
from shoal.server.assemble import assemble
from shoal.server.config import ServeConfig
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.http.services import Services

pytestmark = pytest.mark.usefixtures("own_cache")

Make = Callable[..., Any]


def settings(base: Any, folder: Path, **change: Any) -> ServeConfig:
    fields: dict[str, Any] = {
        "model": str(base.path),
        "registry": f"sqlite:///{folder / 'registry.db'}",
        "device": "cpu",
        "basis_rank": 16,
        "kv_cache_memory": 8 << 20,
        "adapter_memory": 32 << 20,
        "max_model_len": 128,
        "block_size": 4,
        "max_num_seqs": 24,
        "max_num_batched_tokens": 28,
    }
    return ServeConfig(**(fields | change))


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
    try:
        return [t async for event in services.engine.generate(request) for t in event.token_ids]
    finally:
        if spec:
            services.library.unstage(spec)


def check_mixed(base: Any, adapters: list[Any], folder: Path, **change: Any) -> list[AdapterInfo]:
    """Serve all adapters and the base at once, and compare every token; returns what they became.

    Each has two prompts, one of them longer than a step, with a common beginning.
    """
    rng = random.Random(3)
    common = [rng.randrange(2, 258) for _ in range(13)]
    jobs = []
    for which in range(-1, len(adapters)):
        for length in (rng.randrange(1, 9), rng.randrange(20, 40)):
            jobs.append((which, common + [rng.randrange(2, 258) for _ in range(length)]))
    with assemble(settings(base, folder, **change)) as services:
        infos = [services.library.upload(f"a{i}", a.files) for i, a in enumerate(adapters)]

        async def all_at_once() -> list[list[int]]:
            async with running(services):
                return await asyncio.gather(
                    *(
                        generate(services, prompt, 8, infos[which] if which >= 0 else None, str(i))
                        for i, (which, prompt) in enumerate(jobs)
                    )
                )

        got = asyncio.run(all_at_once())
    for (which, prompt), tokens in zip(jobs, got, strict=True):
        deltas = adapters[which].deltas if which >= 0 else None
        assert tokens == base.greedy(prompt, 8, deltas), (which, len(prompt))
        if deltas:  # an adapter that changes nothing would prove nothing
            assert tokens != base.greedy(prompt, 8), (which, len(prompt))
    return infos


@pytest.mark.usefixtures("any_runner")
@pytest.mark.parametrize(
    "architecture", ["tied_llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
)
def test_adapters_on_other_architectures(
    architecture: str, make_base: Make, make_adapter: Make, tmp_path: Path
) -> None:
    base = make_base(architecture)
    kinds = [("lora_xs", 5), ("foreign_xs", 4), ("miss", 7), ("lora", 3)]
    adapters = [make_adapter(kind, rank, i, base=base) for i, (kind, rank) in enumerate(kinds)]
    infos = check_mixed(base, adapters, tmp_path)
    assert [info.family for info in infos] == ["core", "core", "fold", "lora"]


@pytest.mark.usefixtures("any_runner")
def test_every_form_of_lora_xs(tiny: Any, make_adapter: Make, tmp_path: Path) -> None:
    def some(module: str) -> bool:
        return "layers.1" in module and module.endswith(("k_proj", "down_proj", "up_proj"))

    adapters = [
        make_adapter("lora_xs", 6, 20),
        make_adapter("rotated_xs", 6, 21),
        make_adapter("compact_xs", 5, 22),
        make_adapter("odd_xs", 4, 23),
        make_adapter("lora_xs", 4, 24, dtype=torch.bfloat16),
        make_adapter("lora_xs", 4, 25, dtype=torch.float16),
        # On a few modules, with a basis that has nothing for the others.
        make_adapter("foreign_xs", 4, 26, modules=some, strength=3.0),
        make_adapter("compact_xs", 7, 27, modules=some, strength=3.0),
        # rsLoRA: s = alpha / sqrt(r).
        make_adapter("lora_xs", 4, 28, config={"use_rslora": True, "lora_alpha": 3.0}, scale=1.5),
        make_adapter(
            "compact_xs", 4, 29, config={"use_rslora": True, "lora_alpha": 3.0}, scale=1.5
        ),
    ]
    infos = check_mixed(tiny, adapters, tmp_path)
    core = [info.family == "core" for info in infos]
    assert core == [True, True, True, False, False, True, True, True, True, True]
    canonical = infos[2].basis_id
    # Files of other signs, and rotated ones, are put on the canonical basis by their span.
    assert [i for i in range(10) if infos[i].basis_id == canonical] == [0, 1, 2, 7, 8, 9]


@pytest.mark.usefixtures("any_runner")
def test_every_form_of_lora_and_miss(tiny: Any, make_adapter: Make, tmp_path: Path) -> None:
    def attention(module: str) -> bool:
        return "self_attn" in module

    adapters = [
        make_adapter("lora", 4, 40, dtype=torch.bfloat16),
        make_adapter("lora", 60, 41, strength=0.1),  # above every module's own rank
        make_adapter("lora", 4, 42, config={"use_rslora": True, "lora_alpha": 3.0}, scale=1.5),
        make_adapter("lora", 4, 43, modules=attention, strength=1.5),
        make_adapter("miss", 7, 44, dtype=torch.bfloat16),
        make_adapter("miss", 48, 45),  # as many rows as the smaller input
        make_adapter("miss", 5, 46, modules=attention, strength=2.0),
        make_adapter("mini", 11, 47, dtype=torch.float16),
    ]
    infos = check_mixed(tiny, adapters, tmp_path)
    assert [info.family for info in infos] == ["lora"] * 4 + ["fold"] * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_server_takes_adapters_made_for_the_float32_base(
    dtype: str, tiny: Any, make_adapter: Make, tmp_path: Path
) -> None:
    adapter = make_adapter("compact_xs", 8, 80)
    prompt = list(range(30, 60))
    with assemble(settings(tiny, tmp_path, dtype=dtype)) as services:
        info = services.library.upload("a", adapter.files)

        async def both() -> list[list[int]]:
            async with running(services):
                return [await generate(services, prompt, 1, i, "x") for i in (info, None)]

        got = asyncio.run(both())
    assert got == [tiny.greedy(prompt, 1, adapter.deltas), tiny.greedy(prompt, 1)]
    with assemble(settings(tiny, tmp_path)) as services:  # one basis for both
        assert replace(services.library.upload("a", adapter.files), used=None) == info


def test_random_weights_are_another_base(tiny: Any, make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter("compact_xs", 8, 80)
    with (
        assemble(settings(tiny, tmp_path, load_format="dummy")) as services,
        pytest.raises(AdapterRejected, match="does not match"),
    ):
        services.library.upload("a", adapter.files)
    with assemble(settings(tiny, tmp_path)) as services:
        assert services.library.upload("a", adapter.files).version == 1


@pytest.mark.usefixtures("any_runner")
def test_modules_smaller_than_the_rank(make_base: Make, make_adapter: Make, tmp_path: Path) -> None:
    base = make_base("llama")  # k and v have 24 outputs
    adapters = [
        make_adapter("compact_xs", 30, 60, base=base),
        make_adapter("compact_xs", 9, 61, base=base),
        make_adapter("lora_xs", 24, 62, base=base),
    ]
    infos = check_mixed(base, adapters, tmp_path, basis_rank=32)
    assert [info.rank for info in infos] == [30, 9, 24]
