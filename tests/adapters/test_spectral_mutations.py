"""SVF and SVFT files with anything wrong: refused by an error of ours, or read as what they say."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.spectral_world import World, targets
from torch import Tensor

from shoal.adapters.errors import AdapterError
from shoal.adapters.formats.writing import write_svf, write_svft
from shoal.adapters.packing import pack_adapter
from shoal.adapters.record import from_record, to_record

VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 2.5, 1e308, "", "z", "logits", [], {}, [1])
FIELDS = ("peft_type", "basis", "vector", "max_mult", "renormalise", "bias", "r", "modules_to_save")


def mutated(tensor: Tensor, draw: random.Random) -> Tensor:
    how = draw.randrange(9)
    if how == 0:
        return tensor.reshape(-1)[: draw.randrange(1, 4)].clone()
    if how == 1:
        return tensor.reshape(1, *tensor.shape)
    if how == 2:
        return tensor.to(draw.choice([torch.float16, torch.bfloat16, torch.int32, torch.int64]))
    if how == 3:
        return torch.zeros_like(tensor)
    if how == 4:
        return torch.zeros(0, dtype=tensor.dtype)
    if how == 5:
        return torch.tensor(0).to(tensor.dtype)
    changed = tensor.clone()
    place = draw.randrange(changed.numel())
    wild = [2**31 - 1, -(2**31), 15] if not changed.is_floating_point() else [3e38, -3e38, 1e-45]
    if how == 6 and changed.is_floating_point():
        wild = [float("nan"), float("inf")]
    changed.view(-1)[place] = draw.choice(wild)
    return changed


@pytest.mark.parametrize("kind", ["svf", "svft"])
def test_mutations_never_crash(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path)
    folder = tmp_path / "good"
    chosen = targets("k_proj", "down_proj")
    if kind == "svf":
        write_svf(folder, {t: torch.randn(world.sizes(t)[2]) for t in chosen}, basis=world.basis)
    else:
        index = torch.arange(5).int()
        write_svft(
            folder,
            dict.fromkeys(chosen, (index, index.flip(0), torch.randn(5))),
            basis=world.basis,
            gates=dict.fromkeys(chosen, torch.zeros(1)),
            s_pre=dict.fromkeys(chosen, torch.ones(5)),
        )
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    read = refused = 0
    for seed in range(300):
        draw = random.Random(seed)
        changed, given = dict(config), dict(tensors)
        for _ in range(draw.randrange(1, 3)):
            if draw.random() < 0.4:
                changed[draw.choice(FIELDS)] = draw.choice(VALUES)
                continue
            name = draw.choice(sorted(given))
            what = draw.random()
            if what < 0.15 and len(given) > 1:
                del given[name]
            elif what < 0.3:
                given[name.replace("svf", draw.choice(["svd", "svfx", "lora_A"]))] = given[name]
            else:
                given[name] = mutated(given[name], draw)
        save_file({n: t.clone() for n, t in given.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        try:
            weights = world.read(folder)
            assert to_record(from_record(to_record(weights), world.shape)) == to_record(weights)
            packed = pack_adapter(weights, world.shape, "digest", torch.float32)
            assert bool(packed.data.isfinite().all())
            read += 1
        except AdapterError:
            refused += 1
    assert read > 30
    assert refused > 100
