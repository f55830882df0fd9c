"""Conversions keep the delta: out of pickles, to plain LoRA, into a merged base; PEFT agrees."""

import copy
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.adapters.basis import Basis, BasisStore, compute_basis
from shoal.adapters.converting import (
    ConversionError,
    as_lora,
    convert_pickle,
    fresh_directory,
    read_pickle,
    write_plain_lora,
)
from shoal.adapters.deltas import BaseParts
from shoal.adapters.deltas import changes as changes_of
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.keys import module_path
from shoal.adapters.formats.writing import write_compact_lora_xs
from shoal.adapters.merging import (
    Checkpoint,
    bat_changes,
    read_bat,
    target_of,
    write_merged,
)
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights

IDS = torch.tensor([[1, 5, 9, 2, 30, 7]])
TARGETS = {"target_modules": list(MODULES), "task_type": "CAUSAL_LM"}
RESIDUAL: dict[str, Any] = {"r": 3, "lora_alpha": 5, **TARGETS}
PEFT_CASES: Mapping[str, Any] = {
    "lora": LoraConfig(r=4, lora_alpha=6, **TARGETS),
    "lora_uneven": LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"k_proj": 5},
        **TARGETS,
    ),
    "lora_partial": LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1]),
    "miss": MissConfig(r=4, **TARGETS),
    "miss_ragged": MissConfig(r=5, **TARGETS),
    "miss_mini": MissConfig(r=4, mini_r=4, init_weights="mini", **TARGETS),
    "bat": MissConfig(r=4, init_weights="bat", **TARGETS),
    "pissa": LoraConfig(init_lora_weights="pissa", **RESIDUAL),
    "olora": LoraConfig(init_lora_weights="olora", **RESIDUAL),
    "dora": LoraConfig(use_dora=True, **RESIDUAL),
    "dora_olora": LoraConfig(use_dora=True, init_lora_weights="olora", **RESIDUAL),
    "adalora": AdaLoraConfig(init_r=4, lora_alpha=5, total_step=9, **TARGETS),
    "vera": VeraConfig(r=6, **TARGETS),
    "tinylora": TinyLoraConfig(r=3, u=5, **TARGETS),
    "loha": LoHaConfig(r=3, alpha=2, **TARGETS),
    "lokr": LoKrConfig(r=3, alpha=2, **TARGETS),
}


class Base:
    """A tiny random Llama, in memory and on disk."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(3)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
            initializer_range=0.3,
        )
        self.folder = folder
        self.model = LlamaForCausalLM(config).eval()
        self.model.save_pretrained(folder)
        for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "pytorch.bin"):
            (folder / name).write_text(name)
        weights = {target_of(n): t for n, t in self.model.state_dict().items()}
        self.weights = {target: t for target, t in weights.items() if target is not None}
        dims = {module: Dims(*self.weights[Target(0, module)].shape) for module in MODULES}
        self.shape = BaseShape(name="tiny", digest="d" * 64, num_layers=2, dims=dims)
        self.basis = compute_basis(self.weights.__getitem__, self.shape, 8)

    def read(self, folder: Path, canonical: Basis | None = None) -> AdapterWeights:
        return read_adapter(
            adapter_files(folder),
            shape=self.shape,
            weight_of=self.weights.__getitem__,
            bases=BasisStore(folder.parent / "bases"),
            canonical=canonical or Basis("", 0, {}, "canonical"),
            max_bytes=1 << 20,
            max_bases=0,
        )

    def parts(self) -> BaseParts:
        """Whatever is asked for: the one basis, and exact SVDs."""
        return BaseParts(
            self.shape, self.weights.__getitem__, {self.basis.id: self.basis}.__getitem__, self.svd
        )

    def svd(self, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        u, sigma, vt = torch.linalg.svd(self.weights[target].double(), full_matrices=False)
        return u, sigma, vt.T

    def as_lora(self, weights: AdapterWeights) -> AdapterWeights:
        return as_lora(weights, self.parts())

    @torch.inference_mode()
    def with_peft(self, adapter: Path) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the merged weights, of PEFT with that adapter."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(copy.deepcopy(self.model), adapter)
            logits = model(IDS).logits
            return logits, model.merge_and_unload().state_dict()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("tiny"))


def peft_adapter(base: Base, case: str, folder: Path) -> Path:
    """An adapter of random numbers, written by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base.model), copy.deepcopy(PEFT_CASES[case]))
        torch.manual_seed(4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.3
        model.save_pretrained(folder)
    return folder


def xs_adapter(base: Base, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The official layout on a subspace of its own, rank 3, scale 2."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for target, weight in base.weights.items():
        key = f"base_model.model.{module_path(target)}"
        b = torch.linalg.qr(torch.randn(weight.shape[0], 3, generator=generator)).Q
        tensors[f"{key}.lora_A.weight"] = (b.T @ weight).to(dtype)
        tensors[f"{key}.lora_B.weight"] = b.to(dtype).contiguous()
        r = torch.randn(3, 3, generator=generator)
        tensors[f"{key}.default_lora_latent_mapping.weight"] = r
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def xs_delta(folder: Path, module: str) -> Tensor:
    """``s B R A`` in float64 from an official file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.{module}"
    b, r, a = (
        tensors[f"{key}.{kind}.weight"].double()
        for kind in ("lora_B", "default_lora_latent_mapping", "lora_A")
    )
    return 2.0 * b @ r @ a


# -------------------------------------------------------------------------------------- to LoRA


@pytest.mark.parametrize(
    "case", [case for case in PEFT_CASES if not case.startswith(("dora", "bat", "lora"))]
)
def test_a_low_rank_adapter_becomes_lora_that_peft_reads_as_the_same_model(
    base: Base, tmp_path: Path, case: str
) -> None:
    source = peft_adapter(base, case, tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    weights = base.as_lora(base.read(source))
    write_plain_lora(weights, base.shape, out, "tiny")
    want, merged = base.with_peft(source)
    got, again = base.with_peft(out)
    exact = case.startswith("miss")  # no arithmetic; the others round, and PEFT's SVD is float32
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 if exact else 1e-4)
    for name, tensor in merged.items():
        close = 1e-6 if exact else 1e-5
        torch.testing.assert_close(again[name], tensor, rtol=close, atol=close)
    for a, _ in weights.tensors.values():
        assert not exact or set(a.unique().tolist()) <= {0.0, 1.0}
    # And it is read here as what it was.
    read = [changes_of(base.read(folder), base.parts()) for folder in (source, out)]
    for target, weight in base.weights.items():
        one, two = (change[target](weight.double()) for change in read)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_residual_bases_double_the_rank(base: Base, tmp_path: Path) -> None:
    for case in ("pissa", "olora"):
        weights = base.read(peft_adapter(base, case, tmp_path / case))
        assert (weights.rank, weights.correction) == (6, None)


def test_dora_is_not_lora(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="dora is not low-rank") as caught:
        base.as_lora(base.read(peft_adapter(base, "dora", tmp_path / "dora")))
    assert "--merge" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_official_lora_xs_becomes_lora_from_its_own_factors(
    base: Base, tmp_path: Path, dtype: torch.dtype
) -> None:
    source, out = xs_adapter(base, tmp_path / "source", dtype), tmp_path / "out"
    out.mkdir()
    write_plain_lora(base.as_lora(base.read(source)), base.shape, out, "tiny")
    _, merged = base.with_peft(out)
    for target, weight in base.weights.items():
        path = module_path(target)
        want = (weight.double() + xs_delta(source, path)).float()
        torch.testing.assert_close(merged[f"{path}.weight"], want, rtol=1e-5, atol=1e-5)


def test_compact_lora_xs_becomes_lora_of_the_same_delta(base: Base, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    r = {target: torch.randn(4, 4, generator=generator) for target in base.shape.targets()}
    write_compact_lora_xs(tmp_path / "a", r, alpha=12, rank=4, basis=base.basis, shape=base.shape)
    out = tmp_path / "out"
    out.mkdir()
    write_plain_lora(base.as_lora(base.read(tmp_path / "a", base.basis)), base.shape, out, "tiny")
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 12
    _, merged = base.with_peft(out)
    for target, weight in base.weights.items():
        b = base.basis.factors[target][:, :4].double()
        want = weight.double() + 3.0 * b @ r[target].double() @ b.T @ weight.double()
        got = merged[f"{module_path(target)}.weight"]
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_ranks_and_scales_that_differ_survive_as_patterns(base: Base, tmp_path: Path) -> None:
    source, out = peft_adapter(base, "lora_uneven", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    weights = base.read(source)
    write_plain_lora(weights, base.shape, out, "tiny")
    again = base.read(out)
    assert again.scales == pytest.approx(weights.scales)
    assert base.with_peft(out)[0] == pytest.approx(base.with_peft(source)[0], abs=1e-5)


def test_prolora_as_its_trainer_saves_it_is_plain_lora(base: Base, tmp_path: Path) -> None:
    """Chunks of A and B, repeated with their rank axis rolled by one more each time, and one rank
    that is shared with nobody: the trainer's last pickle holds them written out."""
    rank, own, chunks, target = 4, 1, 3, Target(1, "up_proj")
    generator = torch.Generator().manual_seed(8)
    d_out, d_in = base.shape.dims["up_proj"]
    a_chunk, b_chunk = (
        torch.randn(rank - own, -(-size // chunks), generator=generator) for size in (d_in, d_out)
    )
    a_own, b_own = (torch.randn(own, size, generator=generator) for size in (d_in, d_out))

    def written_out(chunk: Tensor, alone: Tensor, size: int) -> Tensor:
        rolled = torch.cat([chunk.roll(-i, 0) for i in range(chunks)], dim=1)
        return torch.cat([rolled[:, :size], alone])

    key = f"base_model.model.{module_path(target)}"
    a, b = written_out(a_chunk, a_own, d_in), written_out(b_chunk, b_own, d_out)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b.T}
    torch.save(tensors, source / "adapter_model.bin")
    config = LoraConfig(r=rank, lora_alpha=6, target_modules=["up_proj"])
    config.save_pretrained(source)
    convert_pickle(source / "adapter_model.bin", source / "adapter_config.json", out)
    weights = base.read(out)
    assert (weights.format, weights.family, weights.rank) == ("lora", "lora", rank)
    # The paper's sum, entry by entry.
    (change,) = changes_of(weights, base.parts()).values()
    delta = change(base.weights[target].double())
    for o, j in ((0, 0), (d_out - 1, d_in - 1), (5, 11), (17, 3)):
        want = float(b_own[0, o] * a_own[0, j])
        for i in range(rank - own):
            a_row = (i + j // a_chunk.shape[1]) % (rank - own)
            b_row = (i + o // b_chunk.shape[1]) % (rank - own)
            entry = b_chunk[b_row, o % b_chunk.shape[1]] * a_chunk[a_row, j % a_chunk.shape[1]]
            want += float(entry)
        assert float(delta[o, j]) == pytest.approx(6 / rank * want, rel=1e-5, abs=1e-6)


# -------------------------------------------------------------------------------------- merging


def merge(base: Base, adapter: Path, out: Path, **options: Any) -> None:
    blocks = read_bat(adapter_files(adapter), base.shape)
    if blocks is not None:
        changes = bat_changes(blocks)
    else:
        changes = changes_of(base.read(adapter), base.parts())
    with fresh_directory(out) as scratch:
        write_merged(Checkpoint(base.folder, base.shape), changes, scratch, **options)


@pytest.mark.parametrize("case", list(PEFT_CASES))
def test_a_merged_base_is_what_peft_merges(base: Base, tmp_path: Path, case: str) -> None:
    adapter = peft_adapter(base, case, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out")
    logits, merged = base.with_peft(adapter)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    state = loaded.state_dict()
    assert state.keys() == merged.keys()
    for name, tensor in merged.items():
        # PEFT's own SVD is in float32.
        close = 1e-5 if case == "pissa" else 1e-6
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=close)
        if target_of(name) is None:
            assert torch.equal(state[name], base.model.state_dict()[name])
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-3, atol=1e-4)


def test_bone_bat_is_miss_bat_under_its_earlier_name(base: Base, tmp_path: Path) -> None:
    adapter = peft_adapter(base, "bat", tmp_path / "adapter")
    blocks = read_bat(adapter_files(adapter), base.shape)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"peft_type": "BONE"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(".miss_", ".bone_"): t for name, t in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    again = read_bat(adapter_files(adapter), base.shape)
    assert blocks is not None
    assert again is not None
    assert all(torch.equal(again[target], block) for target, block in blocks.items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 8}, "r: must be 4"),
        ({"bias": "all"}, "bias"),
        ({"base_correction": {"method": "milora"}}, "base_correction"),
    ],
)
def test_bat_that_cannot_be_merged_is_refused(
    base: Base, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    adapter = peft_adapter(base, "bat", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterRejected, match=match):
        read_bat(adapter_files(adapter), base.shape)


def test_bat_blocks_must_cover_the_outputs(base: Base, tmp_path: Path) -> None:
    adapter = peft_adapter(base, "bat", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterRejected, match="shape"):
        read_bat(adapter_files(adapter), base.shape)


def half_base(base: Base, folder: Path, dtype: torch.dtype) -> Checkpoint:
    copy.deepcopy(base.model).to(dtype).save_pretrained(folder)
    return Checkpoint(folder, base.shape)


def test_sums_are_float32_and_the_dtype_is_kept(base: Base, tmp_path: Path) -> None:
    checkpoint = half_base(base, tmp_path / "half", torch.bfloat16)
    changes = changes_of(base.read(peft_adapter(base, "lora", tmp_path / "adapter")), base.parts())
    with fresh_directory(tmp_path / "out") as scratch:
        write_merged(checkpoint, changes, scratch)
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, target, weight in checkpoint.tensors():
        assert merged[name].dtype == torch.bfloat16
        want = weight
        if target is not None:
            want = (weight.float() + changes[target](weight.float())).bfloat16()
        assert torch.equal(merged[name], want)


def test_shards_stay_below_the_limit_and_load_alike(base: Base, tmp_path: Path) -> None:
    adapter = peft_adapter(base, "miss", tmp_path / "adapter")
    merge(base, adapter, tmp_path / "one")
    merge(base, adapter, tmp_path / "many", shard_bytes=5000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert sum(t.numel() * t.element_size() for t in load_file(file).values()) <= 5000
    one = LlamaForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = LlamaForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())
    # A merged base is a base: merging into shards works too.
    assert len(list(Checkpoint(tmp_path / "many", base.shape).tensors())) == len(one)


def test_a_merged_base_keeps_config_and_tokenizer_but_no_other_weights(
    base: Base, tmp_path: Path
) -> None:
    merge(base, peft_adapter(base, "lora", tmp_path / "adapter"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    }
    assert (tmp_path / "out/config.json").read_bytes() == (base.folder / "config.json").read_bytes()


def test_a_merge_that_overflows_leaves_nothing(base: Base, tmp_path: Path) -> None:
    checkpoint = half_base(base, tmp_path / "half", torch.float16)
    changes = {Target(1, "down_proj"): lambda w: torch.full_like(w, 1e6)}
    with (
        pytest.raises(ConversionError, match=r"down_proj.*overflows"),
        fresh_directory(tmp_path / "out") as scratch,
    ):
        write_merged(checkpoint, changes, scratch)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_base_that_does_not_fit_its_config_is_named(base: Base, tmp_path: Path) -> None:
    wrong = base.shape.dims | {"q_proj": Dims(99, 16)}
    shape = BaseShape(name="tiny", digest="", num_layers=2, dims=wrong)
    with pytest.raises(ConversionError, match=r"q_proj.*must be float \[99, 16\]"):
        list(Checkpoint(base.folder, shape).tensors())
    with pytest.raises(ConversionError, match=r"no weight of layers\.7"):
        Checkpoint(base.folder, base.shape).weight_of(Target(7, "q_proj"))
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConversionError, match="cannot be used"):
        Checkpoint(tmp_path, base.shape)


# -------------------------------------------------------------------------------------- pickles


def test_a_pickle_becomes_the_same_tensors(base: Base, tmp_path: Path) -> None:
    adapter = peft_adapter(base, "lora", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    pickle = tmp_path / "adapter_model.bin"
    torch.save(dict(tensors), pickle)
    convert_pickle(pickle, adapter / "adapter_config.json", tmp_path / "out")
    got = load_file(tmp_path / "out/adapter_model.safetensors")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    config = (tmp_path / "out/adapter_config.json").read_bytes()
    assert config == (adapter / "adapter_config.json").read_bytes()
    assert base.read(tmp_path / "out").rank == 4


def test_views_and_parameters_are_written_whole(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"a": whole.T, "b": torch.nn.Parameter(whole[1:])}, tmp_path / "x.bin")
    tensors = read_pickle(tmp_path / "x.bin")
    assert torch.equal(tensors["a"], whole.T)
    assert torch.equal(tensors["b"], whole[1:])


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("trap-was-run",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"a": torch.zeros(1), "b": Trap()}
    torch.save(content, "x.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConversionError, match="cannot be unpickled safely"):
        read_pickle(Path("x.bin"))
    assert not Path("trap-was-run").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "holds a dict, no tensors"),
        ({"a": 3}, "a is a int"),
        ({1: torch.zeros(1)}, "1 is a Tensor, not a named"),
        ({"state_dict": {"a": torch.zeros(1)}}, "state_dict is a dict"),
        ({"a": torch.zeros(1, dtype=torch.float64)}, "float64, must be one of F32"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "not a plain dense"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "tensors claim"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: object, match: str) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ConversionError, match=match):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_damaged_pickle_is_refused_or_read(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    damaged = [b"", b"x", whole[:-20], whole[: len(whole) // 2], *(
        whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]
        for at in range(0, len(whole), max(1, len(whole) // 40))
    )]  # fmt: skip
    for content in damaged:
        path.write_bytes(content)
        try:
            tensors = read_pickle(path)
        except ConversionError:
            continue
        assert all(tensor.numel() <= 1 << 20 for tensor in tensors.values())


# ---------------------------------------------------------------------------------------- output


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deeper/new"):
        with fresh_directory(tmp_path / name) as scratch:
            (scratch / "file").write_text("x")
            assert not (tmp_path / name / "file").exists()
        assert (tmp_path / name / "file").read_text() == "x"
    with pytest.raises(KeyError), fresh_directory(tmp_path / "failed"):
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deeper", "empty", "new"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "full/file", "link"):
        refused = pytest.raises(ConversionError, match="not an empty directory")
        with refused, fresh_directory(tmp_path / name):
            pass
    assert (tmp_path / "full/file").read_text() == "x"
