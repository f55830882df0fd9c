"""LoHa and LoKr as PEFT writes them: their explicit factors give what PEFT merges."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.adapters.basis import Basis, BasisStore
from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.config_fields import LoraScaling
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights

ALL: dict[str, Any] = {"target_modules": list(MODULES), "task_type": "CAUSAL_LM"}
CASES: dict[str, Any] = {
    "loha": LoHaConfig(r=2, alpha=3, **ALL),
    "loha_wide": LoHaConfig(r=4, alpha=3, **ALL),  # r² exceeds the modules' sides
    "loha_patterns": LoHaConfig(
        r=2, alpha=3, rank_pattern={"q_proj": 3}, alpha_pattern={"layers.1.mlp.up_proj": 5}, **ALL
    ),
    "lokr": LoKrConfig(r=2, alpha=3, **ALL),  # some W2 whole, some in two
    "lokr_both": LoKrConfig(r=1, alpha=3, decompose_both=True, **ALL),
    "lokr_factor": LoKrConfig(r=2, alpha=3, decompose_factor=2, **ALL),
    "lokr_whole": LoKrConfig(r=8, alpha=3, rank_pattern={"v_proj": 12}, **ALL),
    "lokr_partial": LoKrConfig(r=1, alpha=1, target_modules=["o_proj"], layers_to_transform=[1]),
}


class Lycoris:
    """A tiny Llama of odd sizes (its prime numbers leave LoKr little to split), and a folder."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(3)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=18,
                intermediate_size=21,
                num_hidden_layers=2,
                num_attention_heads=3,
                num_key_value_heads=1,
                vocab_size=11,
                initializer_range=0.3,
            )
        )
        self.folder = folder
        self.weights = adaptable(self.model)
        dims = {module: Dims(*self.weights[Target(0, module)].shape) for module in MODULES}
        self.shape = BaseShape(name="odd", digest="d" * 64, num_layers=2, dims=dims)

    def save(self, case: str) -> tuple[Path, dict[Target, Tensor]]:
        """An adapter of random numbers as PEFT writes it, and what PEFT's merge changes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(self.model), copy.deepcopy(CASES[case]))
            torch.manual_seed(4)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn_like(parameter)
            model.save_pretrained(self.folder / case)
            merged = adaptable(model.double().merge_and_unload())
        return self.folder / case, {
            target: weight - self.weights[target].double() for target, weight in merged.items()
        }

    def read(self, folder: Path, **limits: int) -> AdapterWeights:
        return read_adapter(
            adapter_files(folder),
            shape=self.shape,
            weight_of=self.weights.__getitem__,
            bases=BasisStore(self.folder / "bases"),
            canonical=Basis("", 0, {}, "canonical"),
            **{"max_bytes": 1 << 20, "max_bases": 0} | limits,
        )


def adaptable(model: torch.nn.Module) -> dict[Target, Tensor]:
    return {
        Target(int(name.split(".")[2]), name.split(".")[4]): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.endswith("_proj.weight")
    }


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def replace(folder: Path, name: str, *parts: tuple[str, Tensor]) -> Path:
    """Take the first tensor of that kind out, and put others in under the same module."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(name))
    del tensors[key]
    for kind, tensor in parts:
        tensors[key.removesuffix(name) + kind] = tensor
    save_file(tensors, path)
    return folder


@pytest.fixture
def lycoris(tmp_path: Path) -> Lycoris:
    return Lycoris(tmp_path)


@pytest.mark.parametrize("case", list(CASES))
def test_delta_equals_what_peft_merges(lycoris: Lycoris, case: str) -> None:
    folder, deltas = lycoris.save(case)
    weights = lycoris.read(folder)
    assert (weights.format, weights.family) == (case.partition("_")[0], "lora")
    expected = {target for target, delta in deltas.items() if bool(delta.any())}
    assert set(weights.tensors) == set(weights.scales) == expected
    for target, (a, b) in weights.tensors.items():
        assert a.shape[0] <= min(lycoris.shape.dims[target.module])
        got = weights.scales[target] * b.double() @ a.double()
        torch.testing.assert_close(got, deltas[target], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_golden_deltas(golden: Any, case: str) -> None:
    golden.assert_delta(golden.read(golden.copy(case)), case)


@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_half_precision_files_are_multiplied_in_float64(lycoris: Lycoris, case: str) -> None:
    folder, _ = lycoris.save(case)
    path = folder / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    rounded = lycoris.read(folder)
    save_file({n: t.bfloat16().float() for n, t in load_file(path).items()}, path)
    wide = lycoris.read(folder)
    for target, parts in wide.tensors.items():
        assert all(map(torch.equal, rounded.tensors[target], parts))
        assert parts[0].dtype == torch.float32


def test_ranks_are_those_of_the_products(lycoris: Lycoris) -> None:
    assert lycoris.read(lycoris.save("loha")[0]).rank == 4
    weights = lycoris.read(lycoris.save("lokr_both")[0])
    assert {parts[0].shape[0] for parts in weights.tensors.values()} == {1}


def test_limits_hold_before_anything_is_multiplied(lycoris: Lycoris) -> None:
    loha, _ = lycoris.save("loha")
    with pytest.raises(AdapterRejected, match=r"hada_w1_b.*rank 4, at most 3.*convert --merge"):
        lycoris.read(loha, max_rank=3)
    wide, _ = lycoris.save("loha_wide")
    stored = sum(path.stat().st_size for path in adapter_files(wide).values())
    with pytest.raises(AdapterTooLarge, match=rf"exceeds {stored} bytes as plain LoRA; .*--merge"):
        lycoris.read(wide, max_bytes=stored)
    lokr, _ = lycoris.save("lokr_whole")
    with pytest.raises(AdapterRejected, match=r"lokr_w1.*at most 2 is served"):
        lycoris.read(lokr, max_rank=2)


def test_tucker_is_refused(lycoris: Lycoris) -> None:
    folder, _ = lycoris.save("loha")
    folder = replace(folder, "hada_w1_a", ("hada_t1", torch.ones(2, 2, 3, 3)))
    with pytest.raises(AdapterRejected, match=r"hada_t1: is of a Tucker decomposition"):
        lycoris.read(folder)
    folder, _ = lycoris.save("lokr")
    folder = replace(folder, "lokr_w1", ("lokr_t2", torch.ones(2, 2, 3, 3)))
    with pytest.raises(AdapterRejected, match=r"lokr_t2: is of a Tucker decomposition"):
        lycoris.read(folder)


@pytest.mark.parametrize(
    ("case", "name", "parts", "message"),
    [
        ("loha", "hada_w2_a", [], r"_proj\.hada_w2_a: is missing"),
        ("loha", "hada_w1_b", [], r"_proj\.hada_w1_b: is missing"),
        ("loha", "hada_w1_a", [("hada_w1_a", (18, 3))], r"shape \[18, 3\] must be \[18, 2\]"),
        ("loha", "hada_w1_b", [("hada_w1_b", (18,))], "must have two axes"),
        ("loha", "hada_w1_a", [("hada_w9", (18, 2))], "is not a tensor of a loha adapter"),
        ("lokr", "lokr_w1", [], r"lokr_w1: is missing, and so are its two factors"),
        ("lokr", "lokr_w2_a", [], r"lokr_w2_a: is missing"),
        ("lokr", "lokr_w1", [("lokr_w1", (2, 3))], r"must be \["),
        ("lokr", "lokr_w1", [("lokr_w1", (3,))], "must have two axes"),
        ("lokr_both", "lokr_w1_a", [("lokr_w1", (3, 3))], r"lokr_w1_b: lokr_w1 is given whole"),
        ("lokr_both", "lokr_w1_b", [("lokr_w1_b", (2, 3))], "must have the 1 rows"),
    ],
)
def test_bad_tensors_are_named(
    lycoris: Lycoris,
    case: str,
    name: str,
    parts: list[tuple[str, tuple[int, ...]]],
    message: str,
) -> None:
    folder = replace(lycoris.save(case)[0], name, *((k, torch.ones(s)) for k, s in parts))
    with pytest.raises(AdapterRejected, match=message):
        lycoris.read(folder)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("loha", {"r": 3}, r"hada_w1_b: has rank 2; adapter_config\.json says 3"),
        ("loha", {"alpha": "x"}, "alpha: must be a finite number"),
        ("loha", {"bias": "all"}, "bias"),
        ("loha", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("loha", {"peft_type": "LOKR"}, "peft_type: is LOKR, but the tensors are those of loha"),
        ("lokr_whole", {"r": 0}, "r: must be a positive integer"),
        ("lokr_whole", {"rank_pattern": {"q_proj": 4, "_proj": 5, "0.*q_proj": 6}}, "rank_pattern"),
        ("lokr_whole", {"rank_pattern": {"q_proj": 2.5}}, "must give .* one positive integer"),
        ("lokr_whole", {"rank_pattern": {"q_proj": 0}}, "must give .* one positive integer"),
    ],
)
def test_bad_fields_are_named(
    lycoris: Lycoris, case: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterRejected, match=message):
        lycoris.read(edit(lycoris.save(case)[0], **changes))


def test_the_rank_of_a_whole_lokr_is_the_configs() -> None:
    scaling = LoraScaling({"r": 8, "rank_pattern": {"q_proj": 12}})
    assert scaling.told_rank("model.layers.0.self_attn.q_proj") == 12
    assert scaling.told_rank("model.layers.0.self_attn.k_proj") == 8


def test_products_that_overflow_are_refused(lycoris: Lycoris) -> None:
    folder, _ = lycoris.save("loha")
    path = folder / "adapter_model.safetensors"
    save_file({n: t * 1e30 for n, t in load_file(path).items()}, path)
    with pytest.raises(AdapterRejected, match=r"layers\.0\.q_proj: the product .* overflows"):
        lycoris.read(folder)
