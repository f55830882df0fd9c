"""What PEFT can write and no shared base can serve: refused, each by its own name and reason.

PEFT writes the files where it can make them here; where it needs data or another model, the field
that it would have written is put into a LoRA's config.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from shoal.adapters.errors import AdapterRejected

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ONE = {"target_modules": ["q_proj", "v_proj"]}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def write(peft_base: Any, config: Any) -> Path:
    model = get_peft_model(peft_base.model(), config)
    return Path(peft_base.save(model))


def lora(**more: Any) -> Callable[[], Any]:
    return lambda: LoraConfig(r=2, **ONE | more)


def other(name: str, **config: Any) -> Callable[[], Any]:
    """A config of another method; skipped where the installed PEFT lacks it."""

    def make() -> Any:
        if not hasattr(peft, name):
            pytest.skip(f"this PEFT has no {name}")
        return getattr(peft, name)(**config)

    return make


WRITTEN: dict[str, tuple[Callable[[], Any], str]] = {
    "bias of adapted modules": (
        lora(bias="lora_only"),
        "bias: trained biases are not served",
    ),
    "bias of all": (lora(bias="all"), "bias: trained biases are not served"),
    "bias of lora_B": (lora(lora_bias=True), r"lora_B\.bias: biases are not served"),
    "a replaced head": (lora(modules_to_save=["lm_head"]), r"lm_head\.weight: embeddings and"),
    "a replaced embedding": (
        lora(modules_to_save=["embed_tokens"]),
        r"embed_tokens\.weight: embeddings and the output head are not adaptable",
    ),
    "a replaced norm": (lora(modules_to_save=["norm"]), r"norm\.weight: normalisation weights"),
    "an adapted embedding": (
        lora(target_modules=["q_proj", "embed_tokens"]),
        r"embed_tokens\.(base_layer|lora_embedding_[AB]).*: (embeddings|adapted embeddings)",
    ),
    "an adapted head": (
        lora(target_modules=["q_proj", "lm_head"]),
        r"lm_head\..*: embeddings and the output head are not adaptable",
    ),
    "replaced tokens": (
        lora(trainable_token_indices=[1, 2]),
        r"trainable_tokens_delta: replaced embedding rows \(trainable tokens\) are not served",
    ),
    "a random residual": (
        lora(init_lora_weights="pissa_niter_2"),
        "init_lora_weights: pissa_niter_2 trains on a base that was changed in a way that cannot",
    ),
    "KaSA": (
        lambda: LoraConfig(r=2, kasa_config=peft.KasaConfig(), **ONE),
        r"lora_diag: KaSA is not served: it removes singular components",
    ),
    "activated": (
        lora(alora_invocation_tokens=[1, 2]),
        r"alora_invocation_tokens: activated LoRA \(aLoRA\) is not served",
    ),
    "block diagonal": (
        lambda: LoraConfig(
            r=2,
            use_bdlora=peft.BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2),
            target_modules=["q_proj"],
        ),
        "use_bdlora: block-diagonal LoRA is not served",
    ),
    "VeLoRA": (
        lambda: LoraConfig(r=2, velora_config=peft.VeloraConfig(), **ONE),
        r"velora.*(variant is not served|is not served)",
    ),
    "IA3": (other("IA3Config", feedforward_modules=[], **ONE), r"ia3_l: is not served"),
    "OFT": (other("OFTConfig", r=1, oft_block_size=0, **ONE), "oft_R.*: is not served"),
    "BOFT": (other("BOFTConfig", boft_block_size=1, **ONE), r"boft_(R|s): is not served"),
    "HRA": (other("HRAConfig", r=2, **ONE), r"hra_u: is not served"),
    "RandLoRA": (other("RandLoraConfig", r=2, **ONE), "randlora_.*: is not served"),
    "FourierFT": (other("FourierFTConfig", n_frequency=4, **ONE), "belongs to no format"),
    "VB-LoRA": (
        other("VBLoRAConfig", r=2, num_vectors=4, vector_length=1, topk=2, **ONE),
        "belongs to no format .*peft_type VBLORA",
    ),
    "norms": (other("LNTuningConfig", target_modules=["norm"]), "norm.*: normalisation weights"),
    "PSOFT": (other("PsoftConfig", r=2, **ONE), "psoft_.*: is not served"),
    "prompts": (
        other("PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=2),
        "prompt_embeddings: belongs to no format .*peft_type PROMPT_TUNING",
    ),
    "prefixes": (
        other("PrefixTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=2),
        "prompt_embeddings: belongs to no format .*peft_type PREFIX_TUNING",
    ),
    "tokens alone": (
        other("TrainableTokensConfig", token_indices=[1], target_modules=["embed_tokens"]),
        "replaced embedding rows|embeddings and the output head",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_peft_writes_is_refused_with_its_reason(peft_base: Any, name: str) -> None:
    make, message = WRITTEN[name]
    out = write(peft_base, make())
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(out)
    assert not peft_base.bases.all()


def test_every_method_of_peft_has_a_reader_or_a_refusal(peft_base: Any) -> None:
    """A name in ``peft_type`` alone opens nothing."""
    out = write(peft_base, LoraConfig(r=2, **ONE))
    for name in (each.value for each in peft.PeftType):
        if name != "LORA":
            with pytest.raises(AdapterRejected, match=f"peft_type: is {name}, but the tensors are"):
                peft_base.read(peft_base.edit(out, peft_type=name))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_lora_weights", "corda", "corda trains on a base that was changed .* converts it"),
        ("init_lora_weights", "lora_ga", "lora_ga trains on a base .* residual says true"),
        ("init_lora_weights", "loftq", "loftq trains on a base"),
        ("init_lora_weights", "pissa_niter_16", "must be true, false, gaussian, .* pissa, olora"),
        ("init_lora_weights", {"x": 1}, "trains on a base"),
        ("use_qalora", True, "QA-LoRA is not served"),
        ("monteclora_config", {"x": 1}, "monteclora_config: is not served"),
        ("arrow_config", {"top_k": 2}, "arrow_config: routers are not served"),
        ("megatron_config", {"x": 1}, "megatron_config: is not served"),
        ("layer_replication", [[0, 1], [0, 2]], "the base's layers are not replicated"),
        ("target_parameters", ["mlp.experts.gate_up"], "adapters on raw parameters"),
        ("fan_in_fan_out", True, "fan_in_fan_out: the base stores"),
        ("bias", "MiSS_only", "bias: trained biases are not served"),
        ("modules_to_save", ["score"], "modules_to_save: replaced modules are not served"),
        ("trainable_token_indices", {"embed_tokens": [1]}, "replaced embedding rows"),
        ("base_correction", {"method": "minor", "r": 4}, "minor must be pissa or milora or olora"),
        ("base_correction", ["milora"], "must be an object with method"),
    ],
)
def test_field_says_why_and_what_to_do(
    peft_base: Any, field: str, value: object, message: str
) -> None:
    out = peft_base.edit(write(peft_base, LoraConfig(r=2, **ONE)), **{field: value})
    with pytest.raises(AdapterRejected, match=message) as caught:
        peft_base.read(out)
    assert caught.value.where.startswith(f"adapter_config.json: {field}")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        # Unknown tensors beside an adapted module are never dropped: LoRA-XS would pass for LoRA.
        (f"{Q0}.unknown_latent.weight", (2, 2), "is not a tensor of a lora adapter"),
        (f"{Q0}_lora_latent_mapping.weight", (2, 2), "lora_latent_mapping: is missing"),
        (f"{Q0}.base_layer.weight", (30, 21), "replaced base weights are not served"),
        (f"{Q0}.base_layer.bias", (30,), "biases are not served"),
        (f"{Q0}.bias", (30,), "biases are not served"),
        (f"{Q0}.lora_monteclora_sampler.x", (2,), "this LoRA variant is not served"),
        (f"{Q0}.lora_diag", (2,), "KaSA is not served"),
        ("base_model.model.lm_head.base_layer.weight", (32, 21), "embeddings and the output head"),
        ("base_model.model.model.embed_tokens.base_layer.weight", (33, 21), "embeddings and"),
        ("base_model.model.score.weight", (2, 21), "is not a tensor of a lora adapter"),
        # MoE parameters nest; the second of a module has the first as its base layer.
        (
            "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight",
            (8, 21),
            "replaced base weights",
        ),
        ("base_model.vera_A", (2, 21), "is not a tensor of a lora adapter"),
        # Two sizes that only variants have: A of QA-LoRA and of BD-LoRA is narrower than the input.
        (f"{Q0}.lora_A.weight", (2, 7), r"lora_A\.weight: shape \[2, 7\] must be \[2, 21\]"),
        (f"{Q0}.lora_B.weight", (30, 1), r"lora_B\.weight: shape \[30, 1\] must be \[30, 2\]"),
        # Shards that were not gathered before saving.
        (f"{Q0}.lora_A.weight", (0,), "must have two axes"),
        (f"{Q0}.lora_A.weight", (0, 21), r"lora_B\.weight: shape \[30, 2\] must be \[30, 0\]"),
    ],
)
def test_tensor_that_is_more_than_lora_is_refused(
    peft_base: Any, name: str, shape: tuple[int, ...], message: str
) -> None:
    out = write(peft_base, LoraConfig(r=2, **ONE))
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.put(out, peft_base.tensors(out) | {name: torch.ones(shape)}))


def test_lora_of_rank_zero_is_no_adapter_only_where_the_config_says_so(peft_base: Any) -> None:
    out = write(peft_base, LoraConfig(r=2, **ONE))
    tensors = peft_base.tensors(out)
    empty = {f"{Q0}.lora_A.weight": torch.ones(0, 21), f"{Q0}.lora_B.weight": torch.ones(30, 0)}
    peft_base.put(out, tensors | empty)
    with pytest.raises(AdapterRejected, match=r"lora_A.*has no elements: an adapter whose shards"):
        peft_base.read(out)
    weights = peft_base.read(peft_base.edit(out, rank_pattern={"0.self_attn.q_proj": 0}))
    assert len(weights.tensors) == 3
