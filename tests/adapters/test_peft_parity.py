"""Every LoRA-shaped format against PEFT itself: saved by it, read here, compared module by module.

Outputs in float64 against PEFT's in float32, on a Llama with odd widths; 1e-4 of the output range
is what serving promises.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, TinyLoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer

from shoal.adapters.record import from_record, to_record

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4

CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "lora-random": lambda: LoraConfig(r=3, init_lora_weights=False, target_modules=ALL),
    "rslora": lambda: LoraConfig(r=5, lora_alpha=6, use_rslora=True, target_modules=ALL),
    "patterns": lambda: LoraConfig(
        r=4,
        rank_pattern={"layers.1.self_attn.q_proj": 2, r"^model\.layers\.0\.mlp\..*_proj": 3},
        alpha_pattern={"k_proj": 5, "model.layers.[01].mlp.down_proj": 1.5},
        target_modules=ALL,
    ),
    "partial": lambda: LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=1),
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=ALL),
    "dora-patterns": lambda: LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, use_rslora=True, use_dora=True, target_modules=["q_proj"]
    ),
    "pissa": lambda: LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=ALL),
    "pissa-patterns": lambda: LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, init_lora_weights="pissa", target_modules=ALL
    ),
    "pissa-beyond-the-canonical": lambda: LoraConfig(
        r=9, init_lora_weights="pissa", target_modules=ALL
    ),
    "pissa-dora": lambda: LoraConfig(
        r=3, init_lora_weights="pissa", use_dora=True, target_modules=ALL
    ),
    "olora": lambda: LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora", target_modules=ALL),
    "olora-rslora": lambda: LoraConfig(
        r=4, use_rslora=True, init_lora_weights="olora", target_modules=["v_proj", "down_proj"]
    ),
    "olora-dora": lambda: LoraConfig(
        r=3, lora_alpha=2, init_lora_weights="olora", use_dora=True, target_modules=ALL
    ),
    "mica": lambda: LoraConfig(r=4, init_lora_weights="mica", target_modules=ALL),
    "orthogonal": lambda: LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=ALL),
    "vera": lambda: VeraConfig(r=6, target_modules=ALL),
    "vera-partial": lambda: VeraConfig(r=5, target_modules=["k_proj", "down_proj"]),
    "vera-drawn-again": lambda: VeraConfig(
        r=6, save_projection=False, projection_prng_key=7, target_modules=ALL
    ),
    "vera-drawn-again-partial": lambda: VeraConfig(
        r=3, save_projection=False, target_modules=["k_proj", "o_proj"], layers_to_transform=[1]
    ),
    "tinylora": lambda: TinyLoraConfig(r=3, u=5, target_modules=ALL),
    "tinylora-tied": lambda: TinyLoraConfig(r=2, u=4, weight_tying=0.7, target_modules=ALL),
    "tinylora-one": lambda: TinyLoraConfig(r=2, weight_tying=1.0, target_modules=ALL),
    "tinylora-drawn-again": lambda: TinyLoraConfig(
        r=3, u=5, weight_tying=0.25, save_projection=False, target_modules=["v_proj", "gate_proj"]
    ),
}


# PEFT warns of what it is asked to do here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_outputs_are_pefts(peft_base: Any, name: str, dtype: torch.dtype | None) -> None:
    model = peft_base.adapted(CONFIGS[name](), dtype=dtype)
    # TinyLoRA's factors and VeRA's projections are not trained: only what is, was rounded.
    half = dtype if "tiny" not in name and "vera" not in name else None
    weights = peft_base.read(peft_base.save(model, dtype=half))
    assert peft_base.error(weights, model) < TOLERANCE
    stored = from_record(to_record(weights), peft_base.shape)
    assert peft_base.error(stored, model) < TOLERANCE


def test_lora_fa_is_plain_lora(peft_base: Any) -> None:
    model = peft_base.adapted(CONFIGS["lora"]()).train()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.1)
    tokens = torch.arange(8)[None]
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    weights = peft_base.read(peft_base.save(model))
    assert (weights.format, weights.family, weights.correction) == ("lora", "lora", None)
    assert peft_base.error(weights, model) < TOLERANCE


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_converted_is_plain_lora(peft_base: Any, init: str, rslora: bool) -> None:
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, init_lora_weights=init, target_modules=ALL
    )
    model = get_peft_model(peft_base.model(), config)
    # Only what is loaded again as it was at first can be taken away from what was trained.
    model.peft_config["default"].init_lora_weights = True
    initial = peft_base.folder / "initial"
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = init
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    out = peft_base.folder / "converted"
    model.save_pretrained(out, path_initial_model_for_weight_conversion=str(initial))
    weights = peft_base.read(out)
    assert weights.correction is None
    assert weights.rank == 6
    assert peft_base.error(weights, model) < TOLERANCE


@pytest.mark.parametrize("name", ["dora", "pissa", "olora", "lora"])
def test_float32_files_fit_a_bfloat16_base(
    peft_base: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = peft_base.model

    def rounded() -> Any:  # PEFT computes in float32 on weights that bfloat16 holds exactly
        model = fresh()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        return model

    monkeypatch.setattr(peft_base, "model", rounded)
    peft_base.__init__(peft_base.folder, 8)
    model = peft_base.adapted(CONFIGS[name]())
    weights = peft_base.read(
        peft_base.save(model), weight_of=lambda target: peft_base.weights[target].bfloat16()
    )
    assert peft_base.error(weights, model) < TOLERANCE
