"""What no format serves is refused in files of every format, by the field and with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.conftest import GOLDEN

from shoal.adapters.errors import AdapterRejected

# One of each format and layout that the golden cases have.
CASES = [
    "lora", "lora_pissa", "lora_dora", "xs_new_key", "adalora", "vera", "vera_drawn", "tinylora",
    "miss", "miss_mini", "miss_output", "bone", "loha", "lokr",
]  # fmt: skip
OF_LORA = ("LORA", "ADALORA")

ALWAYS = [
    ("bias", "all", "bias: trained biases are not served; must be none"),
    ("bias", "lora_only", "bias: trained biases are not served"),
    ("bias", "MiSS_only", "bias: trained biases are not served"),
    ("modules_to_save", ["classifier"], "modules_to_save: replaced modules are not served"),
    ("trainable_token_indices", [1], "trainable_token_indices: replaced embedding rows"),
    ("trainable_token_indices", {"embed_tokens": [1]}, "replaced embedding rows are not served"),
    ("layer_replication", [[0, 2], [1, 2]], "layer_replication: the base's layers are not repl"),
    ("target_parameters", ["mlp.experts.up"], "target_parameters: adapters on raw parameters"),
    ("fan_in_fan_out", True, r"fan_in_fan_out: the base stores \(d_out, d_in\) linears"),
    ("megatron_config", {"x": 1}, "megatron_config: is not served"),
]
VARIANTS = [
    ("lora_bias", True, "lora_bias: biases are not served; must be false"),
    ("use_qalora", True, "use_qalora: QA-LoRA is not served"),
    ("use_bdlora", {"nblocks": 2}, "use_bdlora: block-diagonal LoRA is not served"),
    ("alora_invocation_tokens", [5], r"alora_invocation_tokens: activated LoRA \(aLoRA\)"),
    ("kasa_config", {"beta": 1e-4}, "kasa_config: KaSA changes the base weights and is not"),
    ("monteclora_config", {"x": 1}, "monteclora_config: is not served"),
    ("velora_config", {"num_groups": 4}, "velora_config: is not served"),
    ("arrow_config", {"top_k": 2}, "arrow_config: routers are not served"),
    ("init_lora_weights", "corda", "init_lora_weights: corda trains on a base that was changed"),
    ("init_lora_weights", "lora_ga", "init_lora_weights: lora_ga trains on a base"),
    ("init_lora_weights", "loftq", "init_lora_weights: loftq trains on a base"),
    ("init_lora_weights", "pissa_niter_4", "init_lora_weights: pissa_niter_4 trains on a base"),
]


def peft_type(case: str) -> str:
    return str(json.loads((GOLDEN / case / "adapter_config.json").read_text())["peft_type"])


def refused(golden: Any, case: Path, message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        golden.read(case)
    assert not golden.bases.all()


@pytest.mark.parametrize("case", CASES)
def test_what_is_more_than_deltas(golden: Any, case: str) -> None:
    for field, value, message in ALWAYS:
        refused(golden, golden.edit_config(golden.copy(case), **{field: value}), message)


@pytest.mark.parametrize("case", [case for case in CASES if peft_type(case) in OF_LORA])
def test_variants_of_lora(golden: Any, case: str) -> None:
    for field, value, message in VARIANTS:
        refused(golden, golden.edit_config(golden.copy(case), **{field: value}), message)


@pytest.mark.parametrize("case", ["xs_new_key", "adalora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_bases_are_of_lora_and_dora(golden: Any, case: str, init: str) -> None:
    changed = golden.edit_config(golden.copy(case), init_lora_weights=init)
    refused(golden, changed, f"{init} trains on changed base weights, which is served with plain")


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("lora")])
def test_base_correction_is_of_lora_and_dora(golden: Any, case: str) -> None:
    changed = golden.edit_config(golden.copy(case), base_correction={"method": "milora"})
    refused(golden, changed, "base_correction: is served with plain LoRA and DoRA only")


def test_lora_xs_of_r_alone_is_no_guess(golden: Any) -> None:
    """Signs of a recomputed SVD differ between libraries: without B there is no adapter."""
    case = golden.copy("xs_new_key")
    latents = {n: t for n, t in golden.tensors(case).items() if "latent" in n}
    refused(golden, golden.save(case, latents), r"q_proj\.lora_A: is missing")


def test_a_classifier_beside_lora_xs_is_not_dropped(golden: Any) -> None:
    case = golden.copy("xs_new_key")
    head = {"base_model.model.classifier.dense.weight": torch.ones(2, 16)}
    changed = golden.save(case, golden.tensors(case) | head)
    refused(golden, changed, r"classifier\.dense\.weight: is not a tensor of a lora_xs adapter")


def test_a_latent_matrix_is_never_dropped(golden: Any) -> None:
    """PEFT loads such a file as LoRA, without a word."""
    case = golden.copy("xs_new_key")
    tensors = golden.tensors(case)
    misspelt = {n.replace("default_lora_latent_mapping", "latent"): t for n, t in tensors.items()}
    refused(golden, golden.save(case, misspelt), r"_proj\.latent.*: is not a tensor of a lora")
