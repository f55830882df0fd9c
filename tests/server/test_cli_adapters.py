"""``shoal adapters check`` and ``convert``: what they print, write, refuse and leave alone."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.adapters import corrections
from shoal.adapters.base import base_digest
from shoal.adapters.basis import Basis, BasisStore, compute_basis, make_basis, save_basis
from shoal.adapters.formats.keys import module_path
from shoal.adapters.formats.writing import (
    write_compact_lora_xs,
    write_lora,
    write_miss,
    write_svf,
)
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary, places
from shoal.adapters.registry.shared_bases import SharedBases
from shoal.adapters.spec import MODULES, UNIT_ELEMENTS, Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.server.cli import adapters
from shoal.server.cli.adapters_check import compress
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder
from shoal.server.model.weights import load_model

GOLDEN = Path(__file__).parents[1] / "adapters" / "golden"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Tiny:
    """A tiny base on disk, and adapters for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = folder / "base"
        self.base.mkdir()
        shapes = Decoder(ModelConfig.from_hf(CONFIG)).weight_shapes()
        generator = torch.Generator().manual_seed(0)
        tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        (self.base / "config.json").write_text(json.dumps(CONFIG))
        (self.base / "tokenizer.json").write_text("{}")
        save_file(tensors, self.base / "model.safetensors")
        self.decoder = load_model(self.base, device="cpu", dtype=torch.float32)
        self.shape = self.decoder.config.base_shape("base", "0" * 64)
        self.basis = compute_basis(self.decoder.weight_of, self.shape, 8)

    def noise(self, rows: int, columns: int) -> Tensor:
        return 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))

    def miss(self) -> Path:
        d = {t: self.noise(4, self.shape.dims[t.module].d_out) for t in self.shape.targets()}
        write_miss(self.folder / "miss", d, rank=4, shape=self.shape)
        return self.folder / "miss"

    def lora(self) -> Path:
        ab = {Target(layer, "q_proj"): (self.noise(2, 16), self.noise(16, 2)) for layer in range(2)}
        write_lora(self.folder / "lora", ab, alpha=3, rank=2, shape=self.shape)
        return self.folder / "lora"

    def compact(self, basis: Basis | None = None) -> Path:
        r = {target: self.noise(4, 4) for target in self.shape.targets()}
        write_compact_lora_xs(
            self.folder / "compact", r, alpha=8, rank=4, basis=basis or self.basis, shape=self.shape
        )
        return self.folder / "compact"

    def official(self, *, orthonormal: bool = True) -> Path:
        """On a subspace of its own."""
        tensors = {}
        for target in self.shape.targets():
            weight = self.decoder.weight_of(target)
            b = torch.linalg.qr(self.noise(weight.shape[0], 3)).Q * (1 if orthonormal else 2)
            key = f"base_model.model.{module_path(target)}"
            tensors[f"{key}.lora_A.weight"] = b.T @ weight
            tensors[f"{key}.lora_B.weight"] = b.contiguous()
            tensors[f"{key}.default_lora_latent_mapping.weight"] = self.noise(3, 3)
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(MODULES)}
        return self.write("official", config, tensors)

    def bat(self) -> Path:
        shapes = {m: (self.shape.dims[m].d_out // 4, 4, 4) for m in MODULES}
        tensors = {
            f"base_model.model.{module_path(t)}.miss_block": 0.1 * torch.ones(shapes[t.module])
            for t in self.shape.targets()
        }
        return self.write("bat", {"peft_type": "MISS", "r": 4, "init_weights": "bat"}, tensors)

    def residual(self, method: str) -> Path:
        """LoRA on one module, trained on what PiSSA, OLoRA or MiLoRA leaves of the base."""
        said = {"init_lora_weights": method}
        if method == "milora":
            said = {"base_correction": {"method": method}}
        ab = {Target(0, "q_proj"): (self.noise(2, 16), self.noise(16, 2))}
        write_lora(self.folder / method, ab, alpha=3, rank=2, shape=self.shape)
        return self.configured(method, **said)

    def dora(self) -> Path:
        source = self.lora()
        tensors = load_file(source / "adapter_model.safetensors")
        for layer in range(2):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"
            tensors[key] = 1 + self.noise(16, 1)[:, 0].abs()
        save_file(tensors, source / "adapter_model.safetensors")
        return self.configured("lora", use_dora=True)

    def svf(self) -> Path:
        basis = SpectralBasis(self.decoder.weight_of, self.shape, self.folder / "own")
        vectors = {
            Target(1, "k_proj"): self.noise(8, 1)[:, 0],
            Target(0, "up_proj"): torch.ones(16),
        }
        write_svf(self.folder / "svf", vectors, basis=basis)
        return self.folder / "svf"

    def configured(self, name: str, **changes: Any) -> Path:
        path = self.folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return self.folder / name

    def write(self, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        folder = self.folder / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Tiny(tmp_path)


@pytest.fixture
def run(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(verb, *arguments) -> (exit code, stdout, stderr)``, with the tiny base."""

    def call(verb: str, *arguments: object, base: object = tiny.base) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        adapters.add_arguments(parser)
        words = [verb, *(str(a) for a in arguments), "--base", str(base), "--basis-rank", "8"]
        capsys.readouterr()
        code = adapters.run(parser.parse_args(words))
        return code, *capsys.readouterr()

    return call


def fields(out: str) -> dict[str, str]:
    return {line[2:11].strip(): line[11:] for line in out.splitlines()[1:]}


def pickled(folder: Path, name: str = "adapter_model.bin") -> Path:
    """``folder`` as PEFT leaves it with ``safe_serialization=False``."""
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / name)
    path.unlink()
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------- check


def test_check_says_what_a_lora_costs(tiny: Tiny, run: Run) -> None:
    code, out, err = run("check", tiny.lora())
    assert (code, err) == (0, "")
    said = fields(out)
    assert (said["family"], said["format"], said["rank"]) == ("lora", "lora", "2")
    assert said["targets"] == "2: layers 0-1: q_proj"
    assert said["scale"] == "1.5"
    assert "basis" not in said
    files = snapshot(tiny.folder / "lora").values()
    assert said["on disk"].startswith(f"{sum(map(len, files)):,} bytes, as a record ")
    assert said["base"] == "needs a base of these shapes; made for base"
    assert said["served"] == "lora r=2"
    # A of every module and Bᵀ of every group, rank 2, two layers.
    elements = 2 * 2 * (16 * 3 + 32 + 16 + 16 + 16 * 2 + 48 + 24 + 16)
    units = -(-elements // UNIT_ELEMENTS) * UNIT_ELEMENTS
    assert said["packed"] == f"{2 * units:,} bytes in bfloat16, {4 * units:,} bytes in float32"
    assert said["decode"].startswith(f"a row reads {2 * elements:,} bytes a step in bfloat16, and")
    assert f"takes {elements:,} multiply-adds" in said["decode"]


def test_check_says_what_a_miss_costs(tiny: Tiny, run: Run) -> None:
    said = fields(run("check", tiny.miss())[1])
    assert (said["family"], said["format"], said["rank"]) == ("fold", "miss", "4")
    assert said["targets"] == "14: 7 modules x 2 layers"
    assert said["launches"] == "fold r=4: two for each fused weight"


def test_check_names_the_basis(tiny: Tiny, run: Run) -> None:
    said = fields(run("check", tiny.compact())[1])
    assert (said["family"], said["format"]) == ("core", "lora_xs, compact layout")
    assert said["basis"].startswith("canonical (")
    assert said["basis"].endswith("rank 8")
    assert said["base"].startswith("needs the weights it was trained on")
    assert "all such rows together" in said["decode"]
    official = tiny.official()
    said = fields(run("check", official)[1])
    assert said["format"] == "lora_xs, official layout"
    assert said["basis"].startswith("its own, kept as a further one")


def test_check_knows_the_bases_of_the_registry(tiny: Tiny, run: Run) -> None:
    registry = f"sqlite:///{tiny.folder / 'registry.db'}"
    bases = places(registry).bases
    official = tiny.official()
    tensors = load_file(official / "adapter_model.safetensors")
    factors = {
        t: tensors[f"base_model.model.{module_path(t)}.lora_B.weight"] for t in tiny.shape.targets()
    }
    own = make_basis(factors, kind="uploaded", base_digest=base_digest(tiny.base))
    bases.mkdir(parents=True)
    save_basis(own, bases / f"{own.id}.safetensors")
    said = fields(run("check", official, "--registry", registry)[1])
    assert said["basis"] == f"known ({own.id[:12]}), rank 3"
    # Another four leave no room; the file's own basis is then not among the known ones.
    (bases / f"{own.id}.safetensors").unlink()
    for _ in range(4):
        turned = {t: torch.linalg.qr(b + torch.rand_like(b)).Q for t, b in factors.items()}
        other = make_basis(turned, kind="uploaded", base_digest=own.base_digest)
        save_basis(other, bases / f"{other.id}.safetensors")
    said = fields(run("check", official, "--registry", registry)[1])
    assert said["family"] == "lora"
    assert said["basis"] == ("none, served as lora: 4 uploaded bases are known, which is the limit")


def test_check_says_why_lora_xs_is_served_as_lora(tiny: Tiny, run: Run) -> None:
    said = fields(run("check", tiny.official(orthonormal=False))[1])
    assert said["family"] == "lora"
    assert said["basis"].startswith("none, served as lora with its own factors")


def test_check_prints_the_refusal(tiny: Tiny, run: Run) -> None:
    code, out, err = run("check", tiny.bat())
    assert (code, err) == (1, "")
    assert out.splitlines()[0].endswith(": refused")
    assert fields(out)["where"] == "adapter_config.json: init_weights"
    assert "shoal adapters convert --merge" in fields(out)["rule"]
    said = fields(run("check", pickled(tiny.lora()))[1])
    assert said["where"] == "file adapter_model.bin"


@pytest.mark.parametrize("method", ["pissa", "olora", "milora"])
def test_check_says_what_is_taken_out_of_the_base(tiny: Tiny, run: Run, method: str) -> None:
    said = fields(run("check", tiny.residual(method))[1])
    assert (said["family"], said["format"], said["rank"]) == ("lora", "lora", "2")
    assert said["served"] == f"{method} as core r=2 + lora r=2"
    known = "canonical (" if method == "pissa" else "of its correction, kept as a further one ("
    assert said["basis"].startswith(known)
    assert said["base"].startswith("needs the weights it was trained on")


def test_a_correction_without_a_basis_of_its_own_needs_the_same_base(
    tiny: Tiny, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrections, "BASES_MAX", 0)
    said = fields(run("check", tiny.residual("milora"))[1])
    assert said["served"] == "lora r=4"
    assert said["base"].startswith("needs the weights it was trained on")


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_check_of_every_golden_case(run: Run, case: str) -> None:
    """Of files as PEFT and the authors write them; the base here has the same shapes."""
    refusals = {
        "lora_bias": "biases are not served",
        "lora_head": "the output head are not adaptable",
        "miss_bat": "bat multiplies the base weights",
    }
    code, out, err = run("check", GOLDEN / case)
    assert code == (1 if case in refusals else 0), out + err
    if case in refusals:
        assert refusals[case] in fields(out)["rule"]
    else:
        assert fields(out)["served"]


def test_check_says_that_dora_scales_outputs(tiny: Tiny, run: Run) -> None:
    said = fields(run("check", tiny.dora())[1])
    assert (said["family"], said["format"]) == ("lora", "dora")
    assert said["served"] == "scale of every output + lora r=2"
    assert said["launches"].startswith("scale of every output: one for each fused weight; lora")


def test_check_computes_the_svds_that_svf_needs(tiny: Tiny, run: Run) -> None:
    code, out, err = run("check", tiny.svf())
    said = fields(out)
    assert (code, said["family"], said["format"]) == (0, "spectral", "svf")
    assert "computing 2 SVDs of base once" in err
    assert said["basis"].startswith("the singular vectors of base (svd-")
    vectors = 2 * (8 * (8 + 16) + 16 * (24 + 16))
    assert said["server"].startswith(f"needs --spectral-memory {vectors} in bfloat16")
    assert said["rank"] == "8, 16"
    assert "16 entries a module" in said["served"]
    # Of the two modules that it changes: U and V.
    assert f"together {2 * (8 * (8 + 16) + 16 * (24 + 16)):,} of the base's" in said["decode"]


def test_check_says_the_same_as_json(tiny: Tiny, run: Run) -> None:
    code, out, _ = run("check", tiny.compact(), "--json")
    said = json.loads(out)
    assert (code, said["served"], said["family"], said["rank"]) == (0, True, "core", 4)
    assert (said["ranks"], said["scales"], said["num_targets"]) == ([4], [2.0], 14)
    elements = 2 * 7 * 4 * 4
    assert said["row_bytes"] == 2 * elements
    outputs = 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)
    assert said["shared_bytes"] == 2 * 4 * outputs
    assert said["multiply_adds"] == 2 * 4 * outputs + elements
    assert said["bank_bytes"] == {"bfloat16": 2048, "float32": 4096}
    assert said["sections"] == [
        {"section": "core r=4", "launches": "none, where its basis has columns of the joint one"}
    ]
    code, out, _ = run("check", tiny.bat(), "--json")
    said = json.loads(out)
    assert (code, said["served"]) == (1, False)
    assert said["where"] == "adapter_config.json: init_weights"


def test_check_survives_whatever_the_files_hold(tiny: Tiny, run: Run) -> None:
    source = tiny.official()
    weights, config = source / "adapter_model.safetensors", source / "adapter_config.json"
    good = weights.read_bytes(), config.read_bytes()
    for path, content in zip((weights, config), good, strict=True):
        for bad in (b"", b"x", b"[]", content[:-9], content[:40], b"\xff" * 64, b"{}" * 9):
            path.write_bytes(bad)
            code, out, err = run("check", source)
            assert (code, err) == (1, "")
            assert set(fields(out)) == {"where", "rule"}
        path.write_bytes(content)
    assert run("check", source)[0] == 0
    code, out, err = run("check", tiny.folder / "nowhere")
    assert (code, out) == (1, "")
    assert "is no directory" in err
    code, _, err = run("check", source, base=tiny.folder / "nowhere")
    assert code == 1
    assert "no model at" in err


def test_check_changes_nothing(tiny: Tiny, run: Run) -> None:
    official = tiny.official()
    run("check", official)  # fills the cache of the base
    before = snapshot(tiny.folder)
    assert run("check", official)[0] == 0
    assert snapshot(tiny.folder) == before
    assert not (tiny.folder / "xdg-data").exists()


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ([(0, "q_proj"), (1, "q_proj"), (2, "q_proj")], "layers 0-2: q_proj"),
        ([(0, "q_proj"), (2, "q_proj")], "layer 0: q_proj; layer 2: q_proj"),
        ([(3, "k_proj"), (3, "v_proj"), (4, "k_proj")], "layer 3: k_proj v_proj; layer 4: k_proj"),
    ],
)
def test_targets_are_compressed(targets: list[tuple[int, str]], text: str) -> None:
    assert compress(Target(*t) for t in targets) == text


# -------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_convert_makes_safetensors_of_a_pickle(tiny: Tiny, run: Run, name: str) -> None:
    source = tiny.lora()
    before = snapshot(source)
    out = tiny.folder / "out"
    code, said, err = run("convert", pickled(source, name), out)
    assert (code, err) == (0, "")
    assert "safetensors" in said
    assert run("check", out)[0] == 0
    after = snapshot(out)
    assert after["adapter_config.json"] == before["adapter_config.json"]
    assert after.keys() == before.keys()


def test_convert_takes_a_pickle_of_any_name(tiny: Tiny, run: Run) -> None:
    source = pickled(tiny.lora(), "checkpoint.pth")
    assert run("convert", source / "checkpoint.pth", tiny.folder / "out")[0] == 0
    assert run("check", tiny.folder / "out")[0] == 0


def test_convert_projects_onto_the_base_s_basis(tiny: Tiny, run: Run) -> None:
    out = tiny.folder / "xs"
    code, said, _ = run("convert", tiny.lora(), out, "--to", "lora-xs", "--rank", "8")
    assert code == 0
    lines = said.splitlines()
    errors = {words[0]: float(words[-1]) for words in map(str.split, lines[1:-1])}
    assert set(errors) == {"layers.0.q_proj", "layers.1.q_proj", "in"}
    assert f"lora-xs r=8, 2 targets, relative error {errors['in']:.4f}" in lines[-1]
    assert 0 < errors["in"] < 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["basis"]["rank"]) == ("LORA_XS", 8)
    # What is written is served, and is what the numbers say.
    said = fields(run("check", out)[1])
    assert (said["family"], said["basis"][:9]) == ("core", "canonical")
    assert run("convert", tiny.folder / "lora", tiny.folder / "one", "--merge")[0] == 0
    assert run("convert", out, tiny.folder / "two", "--merge")[0] == 0
    one, two = (
        load_model(tiny.folder / name, device="cpu", dtype=torch.float32) for name in ("one", "two")
    )
    for layer in range(2):
        target = Target(layer, "q_proj")
        delta = one.weight_of(target) - tiny.decoder.weight_of(target)
        error = (one.weight_of(target) - two.weight_of(target)).norm() / delta.norm()
        assert float(error) == pytest.approx(errors[str(target)], abs=1e-4)


def test_projecting_back_and_forth_loses_nothing(tiny: Tiny, run: Run) -> None:
    assert run("convert", tiny.compact(), tiny.folder / "lora", "--to", "lora")[0] == 0
    code, said, _ = run(
        "convert", tiny.folder / "lora", tiny.folder / "xs", "--to", "lora-xs", "--rank", "4"
    )
    assert code == 0
    assert "relative error 0.0000" in said.splitlines()[-1]
    sizes = [
        sum(map(len, snapshot(tiny.folder / name).values())) for name in ("compact", "lora", "xs")
    ]
    assert sizes[2] < sizes[1]


def test_projecting_needs_a_rank_that_the_basis_has(tiny: Tiny, run: Run) -> None:
    code, _, err = run("convert", tiny.lora(), tiny.folder / "xs", "--to", "lora-xs", "--rank", "9")
    assert code == 1
    assert "--rank 9 exceeds the basis' 8" in err
    assert not (tiny.folder / "xs").exists()


@pytest.mark.parametrize("make", ["miss", "compact", "official"])
def test_convert_to_lora_keeps_what_merging_gives(tiny: Tiny, run: Run, make: str) -> None:
    source = getattr(tiny, make)()
    assert run("convert", source, tiny.folder / "merged", "--merge")[0] == 0
    if make == "official":
        pickled(source)
    code, said, err = run("convert", source, tiny.folder / "lora", "--to", "lora")
    assert (code, err) == (0, "")
    assert "14 targets" in said
    assert fields(run("check", tiny.folder / "lora")[1])["family"] == "lora"
    assert run("convert", tiny.folder / "lora", tiny.folder / "again", "--merge")[0] == 0
    merged = load_model(tiny.folder / "merged", device="cpu", dtype=torch.float32)
    again = load_model(tiny.folder / "again", device="cpu", dtype=torch.float32)
    for target in tiny.shape.targets():
        weight = merged.weight_of(target)
        torch.testing.assert_close(again.weight_of(target), weight, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(weight, tiny.decoder.weight_of(target))


@pytest.mark.parametrize("make", ["pissa", "olora", "milora"])
def test_a_residual_base_becomes_rank_of_plain_lora(tiny: Tiny, run: Run, make: str) -> None:
    source = tiny.residual(make)
    assert run("convert", source, tiny.folder / "plain", "--to", "lora")[0] == 0
    said = fields(run("check", tiny.folder / "plain")[1])
    assert (said["rank"], said["served"]) == ("4", "lora r=4")
    for name, path in (("one", source), ("two", tiny.folder / "plain")):
        assert run("convert", path, tiny.folder / name, "--merge")[0] == 0
    one, two = (
        load_model(tiny.folder / name, device="cpu", dtype=torch.float32) for name in ("one", "two")
    )
    target = Target(0, "q_proj")
    torch.testing.assert_close(one.weight_of(target), two.weight_of(target), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", ["dora", "svf"])
def test_what_is_not_low_rank_is_merged_only(tiny: Tiny, run: Run, make: str) -> None:
    source, out = getattr(tiny, make)(), tiny.folder / "out"
    code, _, err = run("convert", source, out, "--to", "lora")
    assert code == 1
    assert f"{make} is not low-rank" in err
    assert "hint: `shoal adapters convert --merge`" in err
    assert run("convert", source, out, "--merge")[0] == 0
    merged = load_model(out, device="cpu", dtype=torch.float32)
    changed = {
        target
        for target in tiny.shape.targets()
        if not torch.equal(merged.weight_of(target), tiny.decoder.weight_of(target))
    }
    both = {Target(0, "q_proj"), Target(1, "q_proj")}
    assert changed == (both if make == "dora" else {Target(1, "k_proj")})  # a constant z is 1
    assert run("convert", source, tiny.folder / "xs", "--to", "lora-xs", "--rank", "8")[0] == 0


def test_convert_merges_bat_into_a_base_that_loads(tiny: Tiny, run: Run) -> None:
    assert run("convert", tiny.bat(), tiny.folder / "out", "--merge")[0] == 0
    assert (tiny.folder / "out/tokenizer.json").read_text() == "{}"
    merged = load_model(tiny.folder / "out", device="cpu", dtype=torch.float32)
    target = Target(1, "down_proj")
    weight = tiny.decoder.weight_of(target)
    blocks = weight.view(4, 4, 6, 4)
    d = 0.1 * torch.ones(4, 4)
    want = torch.stack(
        [torch.cat([blocks[a, :, c] @ d + d for c in range(6)], dim=1) for a in range(4)]
    )
    torch.testing.assert_close(merged.weight_of(target), weight + want.flatten(0, 1))


@pytest.mark.parametrize("base", ["smollm2", "some/model.gguf"])
def test_convert_says_that_a_gguf_cannot_be_merged_into(tiny: Tiny, run: Run, base: str) -> None:
    code, _, err = run("convert", tiny.bat(), tiny.folder / "out", "--merge", base=base)
    assert code == 1
    assert f"--base {base} is a GGUF file; merging needs a Hugging Face directory" in err
    assert not (tiny.folder / "out").exists()


def test_convert_refuses_and_leaves_nothing(tiny: Tiny, run: Run) -> None:
    lora, bat = tiny.lora(), tiny.bat()
    full = tiny.folder / "full"
    shutil.copytree(lora, full)
    out = tiny.folder / "out"
    bad = tiny.folder / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{")
    (bad / "adapter_model.bin").write_bytes(b"\x80\x02nonsense")
    empty = tiny.folder / "empty"
    empty.mkdir()
    before = snapshot(tiny.folder)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((lora, out), "holds no pickle"),
        ((lora, out, "--to", "lora"), "is LoRA already"),
        ((bat, out, "--to", "lora"), "--merge"),
        ((lora, full), "not an empty directory"),
        ((tiny.folder / "nowhere", out), "does not exist"),
        ((empty, out), "adapter_config.json: is missing"),
        ((bad, out), "must be a JSON object"),
        ((bad / "adapter_model.bin", out, "--merge"), "must be a JSON object"),
    ]
    for arguments, message in cases:
        code, said, err = run("convert", *arguments)
        assert (code, said) == (1, ""), arguments
        error, hint = err.splitlines()
        assert error.startswith("error: ")
        assert message in error
        assert hint.startswith("hint: ")
    (bad / "adapter_config.json").write_text("{}")
    assert "cannot be unpickled safely" in run("convert", bad, out)[2]
    for base, message in ((tiny.folder / "nowhere", "no model at"), (empty, "config.json")):
        code, _, err = run("convert", lora, out, "--merge", base=base)
        assert code == 1
        assert message in err
    (bad / "adapter_config.json").write_text("{")
    after = snapshot(tiny.folder)
    assert {n: b for n, b in after.items() if not n.startswith("cache")} == before
    assert not out.exists()


def test_push_points_to_convert(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    adapters.add_arguments(parser)
    words = ["push", "name", str(pickled(tiny.lora())), "--url", "http://127.0.0.1:1"]
    assert adapters.run(parser.parse_args(words)) == 1
    assert "shoal adapters convert" in capsys.readouterr().err


# ----------------------------------------------------------------------- push, without a server


@pytest.mark.parametrize("kind", ["lora", "compact", "official", "svf"])
def test_a_push_to_a_registry_is_what_a_server_there_serves(
    tiny: Tiny, run: Run, kind: str
) -> None:
    folder = getattr(tiny, kind)()
    url = f"sqlite:///{tiny.folder}/registry.db"
    for reference, version in (("acme/poem", 1), ("acme/poem", 1), ("poem", 1)):
        code, out, err = run("push", reference, folder, "--registry", url)
        assert (code, err.count("error")) == (0, 0), err
        assert out.startswith(f"{reference}@{version}  ")
    shape = tiny.decoder.config.base_shape("base", base_digest(tiny.base))
    shared = SharedBases.open(places(url))
    library = AdapterLibrary.open(
        registry_url=url,
        store_url=None,
        shape=shape,
        weight_of=tiny.decoder.weight_of,
        canonical=compute_basis(tiny.decoder.weight_of, shape, 8),
        bases=BasisStore(shared.folder, shared),
        host=HostTier(1 << 20),
        on_basis=lambda basis: None,
        dtype=torch.float32,
        reserved_names=frozenset(),
        max_upload_bytes=1 << 20,
        shipped=None,
        spectral=SpectralBasis(tiny.decoder.weight_of, shape, tiny.folder / "own"),
        on_spectral=lambda basis, targets: None,
    )
    try:
        info = library.resolve("poem", owner="acme")
        library.unstage(library.stage(info))
        assert info.digest == library.resolve("poem").digest
    finally:
        library.close()


def test_a_push_that_is_refused_says_why_and_makes_no_name(tiny: Tiny, run: Run) -> None:
    url = f"sqlite:///{tiny.folder}/registry.db"
    for reference, folder, says in (
        ("poem", tiny.bat(), "bat"),
        ("../poem", tiny.lora(), "owner '..'"),
        ("Poem", tiny.folder / "lora", "adapter name 'Poem'"),
        ("base", tiny.folder / "lora", "reserved"),
        ("poem", tiny.folder / "nowhere", "adapter_config.json"),
    ):
        code, out, err = run("push", reference, folder, "--registry", url)
        assert (code, out) == (1, "")
        assert says in err
    assert run("push", "poem", tiny.folder / "lora", "--registry", url)[1].startswith("poem@1 ")
