"""Checkpoints as the SVF and SVFT authors' code leaves them, made into adapters and read back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.adapters.spectral_world import MLP, Array, World, assert_close, path_of, targets
from torch import Tensor

from shoal.adapters.converting import ConversionError
from shoal.adapters.converting_spectral import (
    convert_svf,
    convert_svft,
    kind_of,
    read_checkpoint,
)
from shoal.adapters.spec import Target

DOWN, GATE, Q = Target(1, "down_proj"), Target(0, "gate_proj"), Target(0, "q_proj")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def out(world: World) -> Path:
    (world.folder / "out").mkdir(exist_ok=True)
    return world.folder / "out"


# ------------------------------------------------------------------------------------------- SVF


def svf_logits(world: World) -> dict[Target, Tensor]:
    """In the order of a Llama's state dict."""
    generator = torch.Generator().manual_seed(1)
    return {
        Target(layer, module): torch.randn(15, generator=generator).bfloat16()
        for layer in range(2)
        for module in MLP
    }


def numbered(logits: dict[Target, Tensor]) -> dict[str, Tensor]:
    return {f"learnable_params_module_list.{n}": p for n, p in enumerate(logits.values())}


def decomposed(world: World) -> dict[str, Tensor]:
    """``torch.svd`` of float32 weights, with signs as they come."""
    found = {}
    for target in targets():
        u, s, v = torch.svd(world.weights[target])
        flips = torch.where(torch.arange(len(s)) % 2 == 0, -1.0, 1.0)
        name = f"{path_of(target)}.weight"
        found |= {f"{name}.U": u * flips, f"{name}.S": s, f"{name}.V": v * flips}
    return found


def svf_oracle(w: Array, logits: Tensor) -> Array:
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    scaled = sigma * np.asarray(torch.sigmoid(logits).double())
    return (u * scaled) @ vt * sigma.sum() / scaled.sum()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("compared", [False, True])
def test_svf(world: World, named: bool, compared: bool) -> None:
    logits = svf_logits(world)
    stored: dict[str, Tensor] = numbered(logits)
    if named:  # the older file: Parameters by name
        stored = {f"{path_of(t)}.weight": torch.nn.Parameter(p) for t, p in logits.items()}
    torch.save(stored, world.folder / "policy_params.pt")
    tensors = read_checkpoint(world.folder / "policy_params.pt")
    assert kind_of(tensors) == "svf"
    others = decomposed(world) if compared else None
    made = convert_svf(tensors, others, world.basis, out(world))
    assert made.startswith("svf, 6 targets, vectors ")
    weights = world.read(out(world))
    assert set(weights.tensors) == set(logits)
    for target, p in logits.items():
        assert_close(world.merged(weights, target), svf_oracle(world.w(target), p))


def test_svf_that_does_not_fit(world: World) -> None:
    logits = svf_logits(world)
    few = numbered(logits)
    del few["learnable_params_module_list.5"]
    with pytest.raises(ConversionError, match="has 5 vectors, tiny 6 mlp weights"):
        convert_svf(few, None, world.basis, out(world))
    wide = numbered(logits) | {"learnable_params_module_list.2": torch.ones(21)}
    with pytest.raises(ConversionError, match=r"list\.2 has shape \[21\], must be \[15\]"):
        convert_svf(wide, None, world.basis, out(world))
    far = {"model.layers.7.mlp.up_proj.weight": torch.ones(15)}
    with pytest.raises(ConversionError, match=r"layers\.7.* is no weight of tiny"):
        convert_svf(far, None, world.basis, out(world))


def test_svf_on_other_vectors(world: World) -> None:
    """Rotated where singular values are far apart, or missing: not what training had."""
    others = decomposed(world)
    name = f"{path_of(DOWN)}.weight"
    for part in "UV":
        both = others[f"{name}.{part}"]
        others[f"{name}.{part}"] = both[:, [1, 0, *range(2, 15)]]
    with pytest.raises(ConversionError, match=r"down_proj.* component [01] is only 0\.0"):
        convert_svf(numbered(svf_logits(world)), others, world.basis, out(world))
    del others[f"{name}.S"]
    with pytest.raises(ConversionError, match=r"down_proj\.weight\.S is missing"):
        convert_svf(numbered(svf_logits(world)), others, world.basis, out(world))


def test_combined_experts_do_not_say_enough(world: World) -> None:
    with pytest.raises(ConversionError, match="does not say whether their weights were normalised"):
        kind_of({"adaptive_weights": torch.ones(2, 1), "weights_0_k_model": torch.ones(15)})


def test_other_files_are_none_of_these() -> None:
    assert kind_of({}) is None
    assert (
        kind_of({"base_model.model.model.layers.0.mlp.up_proj.lora_A": torch.ones(2, 15)}) is None
    )
    assert kind_of({"model.layers.0.mlp.up_proj.weight": torch.ones(21, 15)}) is None


# ------------------------------------------------------------------------------------------ SVFT


def svft_layer(
    world: World, target: Target, *, rank: int | None = None, width: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """What the authors' layer keeps: float32 vectors with signs as they come, a banded M.

    With ``rank``, the rest is cut off, and filled up again with orthonormal columns and zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    u, s, vt = torch.linalg.svd(world.weights[target], full_matrices=False)
    flips = torch.where(torch.rand(len(s), generator=generator) < 0.5, -1.0, 1.0)
    u, vt = u * flips, vt * flips[:, None]
    n = len(s)
    if rank is not None:
        kept = u[:, :rank], vt.T[:, :rank]
        u = torch.linalg.qr(torch.cat([u[:, :rank], torch.randn(len(u), n - rank)], 1))[0]
        v = torch.linalg.qr(torch.cat([vt.T[:, :rank], torch.randn(vt.shape[1], n - rank)], 1))[0]
        # What QR makes of the leading columns is themselves, but for signs of its own.
        u[:, :rank], v[:, :rank] = kept
        vt, s = v.T, torch.cat([s[:rank], torch.zeros(n - rank)])
    size = n if rank is None else rank
    places = [(i, j) for i in range(size) for j in range(size) if abs(i - j) <= width]
    rows, columns = (torch.tensor(part) for part in zip(*places, strict=True))
    return {
        "u": u,
        "v": vt,
        "s_pre": s,
        "s": torch.randn(len(rows), generator=generator),
        "gate": torch.tensor([0.4]),
        "s_row": rows,
        "s_col": columns,
        "s_pre_row": torch.arange(n),
        "s_pre_col": torch.arange(n),
    }


def effective(layer: dict[str, Tensor]) -> Array:
    """W_eff = u (diag(s_pre) + σ(gate) M) v."""
    part = {name: np.asarray(value.double()) for name, value in layer.items()}
    inner = np.diag(part["s_pre"])
    places = (part["s_row"].astype(int), part["s_col"].astype(int))
    np.add.at(inner, places, part["s"] / (1 + np.exp(-part["gate"])))
    product: Array = part["u"] @ inner @ part["v"]
    return product


def checkpoint(layers: dict[Target, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{path_of(target)}.svft_layer.{name}": value.contiguous()
        for target, layer in layers.items()
        for name, value in layer.items()
    }


def convert(world: World, tensors: dict[str, Tensor], rest: dict[str, Tensor] | None = None) -> str:
    return convert_svft(tensors, world.basis, world.weight_of, (rest or {}).get, out(world))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_svft(world: World, suffix: str) -> None:
    layers = {t: svft_layer(world, t, seed=i) for i, t in enumerate((DOWN, GATE, Q))}
    path = world.folder / f"checkpoint{suffix}"
    if suffix == ".bin":
        torch.save(checkpoint(layers), path)
    else:
        save_file(checkpoint(layers), path)
    tensors = read_checkpoint(path)
    assert kind_of(tensors) == "svft"
    assert convert(world, tensors).startswith("svft, 3 targets, within ")
    weights = world.read(out(world))
    assert set(weights.tensors) == set(layers)
    for target, layer in layers.items():
        assert_close(world.merged(weights, target), effective(layer), 5e-5)
        # Entries of the band, and hardly any more.
        assert len(weights.tensors[target][2]) <= len(layer["s"]) + 3


def test_svft_with_duplicates(world: World) -> None:
    layer = svft_layer(world, GATE)
    layer["s_col"] = layer["s_col"].roll(1)
    layer["s_row"][:4] = layer["s_row"][0]
    layer["s_col"][:4] = layer["s_col"][0]
    convert(world, checkpoint({GATE: layer}))
    assert_close(world.merged(world.read(out(world)), GATE), effective(layer), 5e-5)


@pytest.mark.parametrize("target", [DOWN, GATE, Q])
def test_svft_of_a_smaller_rank(world: World, target: Target) -> None:
    """The rest of W is gone, and the columns that fill up do nothing."""
    layer = svft_layer(world, target, rank=6)
    convert(world, checkpoint({target: layer}))
    want = effective(layer)
    assert np.linalg.matrix_rank(want, tol=1e-4) == 6
    merged = world.merged(world.read(out(world)), target)
    assert np.abs(merged - want).max() <= 1e-4 * np.abs(world.w(target)).max()


def test_rotated_vectors_are_followed(world: World) -> None:
    """Two equal singular values: any two vectors of their plane will do, and trainers differ."""
    u, s, vt = torch.linalg.svd(world.weights[Q])
    s[5] = s[4]
    world.weights[Q] = u * s @ vt
    layer = svft_layer(world, Q)
    turn = torch.eye(15)
    turn[4:6, 4:6] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    layer["u"], layer["v"] = layer["u"] @ turn, turn.T @ layer["v"]
    convert(world, checkpoint({Q: layer}))
    assert_close(world.merged(world.read(out(world)), Q), effective(layer), 5e-5)


def test_trained_filling_columns_are_refused(world: World) -> None:
    """A tall weight's filling columns leave the span of its singular vectors."""
    layer = svft_layer(world, GATE, rank=6)
    layer["s_row"][0] = layer["s_col"][0] = 9
    with pytest.raises(ConversionError, match=r"svft_layer: .* of W lies outside of W's own"):
        convert(world, checkpoint({GATE: layer}))


def test_what_would_take_too_many_entries_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.adapters.converting_spectral.ENTRIES_PER_COMPONENT", 5)
    layer = svft_layer(world, Q)
    convert(world, checkpoint({Q: layer}))
    layer["u"], layer["v"] = layer["u"].bfloat16(), layer["v"].bfloat16()
    with pytest.raises(ConversionError, match=r"takes \d+ entries .* 75 is the limit"):
        convert(world, checkpoint({Q: layer}))


def test_the_rest_of_the_model_must_be_the_bases(world: World) -> None:
    tensors = checkpoint({Q: svft_layer(world, Q)})
    rest = {"model.norm.weight": torch.ones(15), f"{path_of(Q)}.bias": torch.zeros(15)}
    convert(world, tensors | rest | {"model.rotary_emb.inv_freq": torch.ones(2)}, rest)
    halves = {name: value.bfloat16() for name, value in rest.items()}
    convert(world, tensors | halves, rest)
    for name in rest:
        with pytest.raises(ConversionError, match=f"{name} differs from the base's in its values"):
            convert(world, tensors | {name: rest[name] + 0.1}, rest)
    with pytest.raises(ConversionError, match=r"norm\.weight differs from the base's in its shape"):
        convert(world, tensors | {"model.norm.weight": torch.ones(16)}, rest)
    with pytest.raises(ConversionError, match=r"lm_head\.weight cannot be compared with the base"):
        convert(world, tensors | {"lm_head.weight": torch.ones(4, 15)}, rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": None}, r"q_proj\.svft_layer\.gate is missing"),
        ({"u": torch.ones(14, 15)}, r"svft_layer\.u has shape \[14, 15\], must be \[15, 15\]"),
        ({"s_row": torch.full((43,), 15)}, r"s_row must be within 0 and 14"),
        ({"s_pre_row": torch.arange(15).flip(0)}, "s_pre_row must count from 0 to 14"),
        ({"gate": torch.tensor([float("nan")])}, r"svft_layer\.gate is not finite"),
        ({"bias_delta": torch.ones(15)}, r"bias_delta has shape \[15\], must be absent"),
    ],
)
def test_malformed_layers_are_named(world: World, change: dict[str, Any], message: str) -> None:
    layer = {n: v for n, v in (svft_layer(world, Q) | change).items() if v is not None}
    with pytest.raises(ConversionError, match=message):
        convert(world, checkpoint({Q: layer}))


def test_a_pickle_that_runs_code_is_not_read(world: World) -> None:
    path = world.folder / "policy_params.pt"
    torch.save({"learnable_params_module_list.0": print}, path)
    with pytest.raises(ConversionError, match="cannot be unpickled safely"):
        read_checkpoint(path)
