"""The real SmolLM2 on CUDA in float32 against the same server on a CPU: token for token."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.adapters.library import AdapterInfo
from shoal.server.assemble import assemble
from shoal.server.config import ServeConfig
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.http.services import Services

pytestmark = pytest.mark.model

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "My favourite colour",
]
TOKENS = 24
DIMS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.v_proj": (192, 576),
    "mlp.down_proj": (576, 1536),
}


def write_adapter(folder: Path, kind: str, rank: int, seed: int) -> dict[str, Path]:
    """A random LoRA or MiSS adapter of three modules in PEFT's layout."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(30):
        for module, (d_out, d_in) in DIMS.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            if kind == "LORA":
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, d_in, generator=draw) * 0.05
                tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=draw) * 0.05
            else:
                tensors[f"{key}.miss_block"] = torch.randn(rank, d_out, generator=draw) * 0.01
    config = {"peft_type": kind, "r": rank, "bias": "none", "inference_mode": True}
    config["target_modules"] = sorted(module.split(".")[1] for module in DIMS)
    config |= {"lora_alpha": rank} if kind == "LORA" else {"init_weights": True, "mini_r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return {path.name: path for path in folder.iterdir()}


async def generate(
    services: Services, name: str, text: str, info: AdapterInfo | None
) -> tuple[int, ...]:
    spec = None if info is None else services.library.stage(info)
    request = Request(
        id=name,
        prompt_ids=tuple(services.tokenizer.encode(text)),
        sampling=SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True),
        adapter=spec,
    )
    tokens: list[int] = []
    async for event in services.engine.generate(request):
        assert event.error is None, event.error
        tokens += event.token_ids
    if spec is not None:
        services.library.unstage(spec)
    return tuple(tokens)


async def everything(services: Services) -> dict[str, tuple[int, ...]]:
    names = [None, "pirate", "bard", "lora", "miss"]
    found = {name: services.library.resolve(name) if name else None for name in names}
    await services.engine.start()
    try:
        jobs = {
            f"{name} {text}": generate(services, f"{name} {text}", text, found[name])
            for text in PROMPTS
            for name in names
        }
        return dict(zip(jobs, await asyncio.gather(*jobs.values()), strict=True))
    finally:
        await services.engine.stop()


def run(device: str, folder: Path) -> dict[str, tuple[int, ...]]:
    folder.mkdir()
    config = ServeConfig(
        device=device,
        dtype="float32",
        registry=f"sqlite:///{folder / 'registry.db'}",
        max_model_len=256,
        max_num_seqs=32,
        max_num_batched_tokens=64,
    )
    with assemble(config) as services:
        services.library.upload("lora", write_adapter(folder / "lora", "LORA", 16, 1))
        services.library.upload("miss", write_adapter(folder / "miss", "MISS", 8, 2))
        return asyncio.run(everything(services))


def test_tokens_equal_the_cpus(tmp_path: Path) -> None:
    got = run("cuda", tmp_path / "cuda")
    want = run("cpu", tmp_path / "cpu")
    assert len(set(want.values())) > 20, "the adapters say nothing"
    assert {name: got[name] for name in want if got[name] != want[name]} == {}
