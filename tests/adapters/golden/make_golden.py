"""Make the golden adapters beside this file: ``python tests/adapters/golden/make_golden.py``.

Independent of the code under test: PEFT writes the MiSS and LoRA directories and says what merging
them changes; the official LoRA-XS layout is built with scikit-learn's TruncatedSVD as its authors
do, and its deltas come from the formula. Needs ``peft`` and ``scikit-learn``.

Writes ``base.safetensors`` (the adaptable weights of a tiny random Llama), and per case a directory
as a user would upload it plus ``<case>.delta.safetensors``: float32 ``ΔW`` by module path, computed
in float64. Cases without one are to be refused, or changed by the tests: what they compute is
compared with PEFT itself (``test_peft_parity.py``).
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def adaptable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".weight"): value.detach().clone()
        for name, value in model.state_dict().items()
        if name.split(".")[-2] in ALL
    }


def save_deltas(case: str, deltas: dict[str, torch.Tensor]) -> None:
    save_file(
        {k: v.float().contiguous() for k, v in deltas.items()}, HERE / f"{case}.delta.safetensors"
    )


def peft_case(
    case: str, config, *, adapter_name: str = "default", delta: bool = True, masks=None
) -> None:
    """Write one adapter with PEFT, and the change that PEFT's own merge makes."""
    model = get_peft_model(make_base(), config, adapter_name=adapter_name)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3 + (
                1.0 if "magnitude" in name else 0.0
            )
    if masks is not None:
        model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(HERE / case)
    (HERE / case / "README.md").unlink(missing_ok=True)
    if not delta:
        return
    merged = adaptable(model.double().merge_and_unload())
    before = adaptable(make_base().double())
    deltas = {name: merged[name] - before[name] for name in merged}
    save_deltas(case, {name: d for name, d in deltas.items() if d.abs().max() > 0})


def bone_case() -> None:
    """Bone is MiSS under its earlier names."""
    shutil.copytree(HERE / "miss", HERE / "bone")
    config = json.loads((HERE / "bone/adapter_config.json").read_text())
    del config["mini_r"]
    config["peft_type"] = "BONE"
    (HERE / "bone/adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(HERE / "bone/adapter_model.safetensors")
    renamed = {name.replace(".miss_", ".bone_"): value for name, value in tensors.items()}
    save_file(renamed, HERE / "bone/adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(HERE / "miss.delta.safetensors", HERE / "bone.delta.safetensors")


def shards_case() -> None:
    """The MiSS paper's equation 3: rows of D, each repeated over one shard of the outputs."""
    rank = 5
    rng = np.random.default_rng(7)
    tensors, deltas = {}, {}
    for name, weight in adaptable(make_base()).items():
        d_out, d_in = weight.shape
        d = rng.standard_normal((rank, d_in))
        tensors[f"base_model.model.{name}.miss_block"] = torch.from_numpy(d).float()
        sizes = [len(shard) for shard in np.array_split(np.arange(d_out), rank)]
        deltas[name] = torch.from_numpy(np.repeat(d, sizes, axis=0))
    (HERE / "miss_output").mkdir()
    config = MissConfig(r=rank, target_modules=ALL, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(HERE / "miss_output")
    path = HERE / "miss_output/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shard": "output"}, indent=2))
    save_file(tensors, HERE / "miss_output/adapter_model.safetensors", metadata={"format": "pt"})
    save_deltas("miss_output", deltas)


def xs_case(case: str, *, latent: str, seed: int = 42, rank: int = 4, alike: bool = False) -> None:
    """The authors' construction: B and A from a truncated SVD of Wᵀ, R dense, scale alpha/r.

    With ``alike`` the factors come from the SVD of another matrix, as LoRA-SB takes them from a
    gradient: the same file layout, but ``A ≠ BᵀW``.
    """
    rng = np.random.default_rng(seed)
    alpha = 2.0 * rank
    tensors, deltas = {}, {}
    for name, weight in adaptable(make_base()).items():
        matrix = weight.numpy()
        if alike:
            matrix = rng.standard_normal(matrix.shape).astype(np.float32)
        svd = TruncatedSVD(n_components=rank, n_iter=10, random_state=seed).fit(matrix.T)
        a = svd.transform(matrix.T).T.astype(np.float32)
        b = svd.components_.T.astype(np.float32)
        r = rng.standard_normal((rank, rank)).astype(np.float32)
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.from_numpy(a.copy())
        tensors[f"{prefix}.lora_B.weight"] = torch.from_numpy(b.copy())
        tensors[prefix + latent] = torch.from_numpy(r)
        product = b.astype(np.float64) @ r.astype(np.float64) @ a.astype(np.float64)
        deltas[name] = torch.from_numpy(alpha / rank * product)
    (HERE / case).mkdir()
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=ALL, task_type="CAUSAL_LM", inference_mode=True
    )
    config.save_pretrained(HERE / case)
    save_file(tensors, HERE / case / "adapter_model.safetensors", metadata={"format": "pt"})
    save_deltas(case, deltas)


def main() -> None:
    warnings.simplefilter("ignore")
    for old in HERE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
        elif old.suffix == ".safetensors":
            old.unlink()
    save_file(adaptable(make_base()), HERE / "base.safetensors")

    common = {"target_modules": ALL, "task_type": "CAUSAL_LM"}
    peft_case("miss", MissConfig(r=4, **common))
    peft_case("miss_ragged", MissConfig(r=5, **common))
    peft_case("miss_mini", MissConfig(r=4, mini_r=4, init_weights="mini", **common))
    peft_case("miss_bat", MissConfig(r=4, init_weights="bat", **common), delta=False)
    peft_case("miss_named", MissConfig(r=3, target_modules=["v_proj"]), adapter_name="weight")
    bone_case()
    shards_case()

    peft_case("loha", LoHaConfig(r=2, alpha=3, **common))
    peft_case("lokr", LoKrConfig(r=2, alpha=3, **common))

    peft_case("lora", LoraConfig(r=4, lora_alpha=6, **common))
    peft_case("lora_rs", LoraConfig(r=4, lora_alpha=6, use_rslora=True, **common))
    peft_case(
        "lora_patterns",
        LoraConfig(
            r=4,
            lora_alpha=6,
            rank_pattern={"layers.1.self_attn.q_proj": 2, r"^model\.layers\.0\.mlp\..*_proj": 3},
            alpha_pattern={"k_proj": 5, "model.layers.[01].mlp.down_proj": 1.5},
            **common,
        ),
    )
    peft_case(
        "lora_partial",
        LoraConfig(
            r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]
        ),
    )
    one = {"r": 2, "target_modules": ["q_proj"]}
    peft_case("lora_dora", LoraConfig(use_dora=True, **one), delta=False)
    peft_case("lora_pissa", LoraConfig(init_lora_weights="pissa", **one), delta=False)
    peft_case(
        "adalora",
        AdaLoraConfig(init_r=3, total_step=9, target_modules=["q_proj", "v_proj"]),
        masks={
            "model.layers.0.self_attn.q_proj.lora_E": [True, False, True],
            "model.layers.1.self_attn.v_proj.lora_E": [False, False, False],
        },
        delta=False,
    )
    peft_case("vera", VeraConfig(r=3, target_modules=["q_proj", "up_proj"]), delta=False)
    peft_case(
        "vera_drawn",
        VeraConfig(r=3, target_modules=["q_proj", "up_proj"], save_projection=False),
        delta=False,
    )
    peft_case("tinylora", TinyLoraConfig(u=3, target_modules=["v_proj", "up_proj"]), delta=False)
    peft_case("lora_head", LoraConfig(modules_to_save=["lm_head"], **one), delta=False)
    peft_case("lora_bias", LoraConfig(lora_bias=True, **one), delta=False)

    xs_case("xs_new_key", latent=".default_lora_latent_mapping.weight")
    xs_case("xs_old_key", latent="_lora_latent_mapping.weight")
    xs_case("xs_rank_8", latent=".default_lora_latent_mapping.weight", rank=8)
    xs_case("xs_alike", latent=".default_lora_latent_mapping.weight", alike=True)


if __name__ == "__main__":
    main()
