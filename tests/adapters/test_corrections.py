"""What PiSSA, MiLoRA and OLoRA took out of the base, found again and shared."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.adapters import corrections
from shoal.adapters.basis import BasisStore, load_basis, make_basis
from shoal.adapters.corrections import BASES_MAX, columns
from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.families import core
from shoal.adapters.formats.writing import write_lora
from shoal.adapters.spec import Target
from shoal.adapters.weights import CORRECTION_METHODS, AdapterWeights, CorrectionMethod

Q0 = Target(0, "q_proj")
SHAPES = [(12, 12), (7, 19), (19, 7)]


def random_weight(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


def removed(b: Tensor, weight: Tensor) -> Tensor:
    """What ``B`` takes out of ``W``."""
    wide = b.double()
    return wide @ (wide.T @ weight.double())


def write(peft_base: Any, rank: int = 3, **config: object) -> Path:
    """A LoRA of random factors on every module, with fields of its config set."""
    dims = peft_base.shape.dims
    generator = torch.Generator().manual_seed(rank)
    ab = {
        t: (
            torch.randn(rank, dims[t.module].d_in, generator=generator),
            torch.randn(dims[t.module].d_out, rank, generator=generator),
        )
        for t in peft_base.shape.targets()
    }
    out = Path(peft_base.folder / "written")
    write_lora(out, ab, alpha=2.0 * rank, rank=rank, shape=peft_base.shape)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def correction(method: str, **more: object) -> dict[str, object]:
    return {"method": method, **more}


# --------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_milora_takes_the_last_singular_components(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(*shape).to(dtype)
    # As its author does it: a float32 SVD of the stored weight, the last r of the thin factors.
    u, s, vh = np.linalg.svd(weight.float().numpy(), full_matrices=False)
    for rank in (1, 3):
        theirs = u[:, -rank:] @ np.diag(s[-rank:]) @ vh[-rank:]
        ours = removed(columns("milora", weight, Q0, rank), weight)
        assert np.abs(ours.numpy() - theirs).max() < 1e-5 * s[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_takes_the_first_and_olora_the_first_of_qr(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    q, r = np.linalg.qr(weight.numpy())
    leading = u[:, :3] @ np.diag(s[:3]) @ vh[:3]
    assert np.abs(removed(columns("pissa", weight, Q0, 3), weight).numpy() - leading).max() < 1e-5
    first = q[:, :3] @ r[:3]
    assert np.abs(removed(columns("olora", weight, Q0, 3), weight).numpy() - first).max() < 1e-5


@pytest.mark.parametrize("method", CORRECTION_METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_smaller_ranks_are_leading_columns(
    method: CorrectionMethod, shape: tuple[int, int]
) -> None:
    weight = random_weight(*shape)
    whole = columns(method, weight, Q0, 64)
    assert whole.shape == (shape[0], min(shape))
    small = columns(method, weight, Q0, 3)
    assert torch.allclose(removed(small, weight), removed(whole[:, :3], weight), atol=1e-5)
    assert torch.allclose(whole.T @ whole, torch.eye(min(shape)), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_components_that_rounding_leaves_no_direction_take_nothing(shape: tuple[int, int]) -> None:
    thin = random_weight(shape[0], 2) @ random_weight(2, shape[1], 1)  # rank 2
    b = columns("milora", thin, Q0, min(shape) - 2)
    assert float(removed(b, thin).abs().max()) < 1e-5
    spread = torch.logspace(0, -9, min(shape), dtype=torch.float64)  # beyond what squares resolve
    u, _, vh = torch.linalg.svd(random_weight(*shape).double(), full_matrices=False)
    steep = u @ torch.diag(spread) @ vh
    assert float(removed(columns("milora", steep, Q0, 3), steep).abs().max()) < 1e-6


# ---------------------------------------------------------------------------------- on a basis


def test_milora_is_plain_lora_until_the_config_says_so(peft_base: Any) -> None:
    plain = peft_base.read(write(peft_base))
    assert plain.correction is None
    told = peft_base.read(write(peft_base, base_correction=correction("milora")))
    assert told.correction is not None
    x = torch.randn(4, 21)
    w = peft_base.weights[Q0].double()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    minor = (u[:, -3:] * s[-3:]) @ vh[-3:]
    expected = peft_base.output(plain, Q0, x) - x.double() @ minor.T
    assert torch.allclose(peft_base.output(told, Q0, x), expected, atol=1e-5)


@pytest.mark.parametrize(("method", "times"), [("pissa", 1.0), ("milora", 1.0), ("olora", 2.0)])
def test_only_olora_scales_what_it_takes(peft_base: Any, method: str, times: float) -> None:
    weights = peft_base.read(write(peft_base, base_correction=correction(method)))
    assert weights.correction.method == method
    assert set(weights.correction.scales.values()) == {times}
    assert set(weights.correction.ranks.values()) == {3}
    assert set(weights.correction.ranks) == set(weights.tensors)


def test_rank_of_the_correction_may_differ_from_the_adapters(peft_base: Any) -> None:
    weights = peft_base.read(write(peft_base, base_correction=correction("milora", r=5)))
    assert weights.rank == 3
    assert set(weights.correction.ranks.values()) == {5}


def test_init_lora_weights_and_base_correction_must_agree(peft_base: Any) -> None:
    agreeing = write(peft_base, init_lora_weights="pissa", base_correction=correction("pissa", r=2))
    assert set(peft_base.read(agreeing).correction.ranks.values()) == {2}
    with pytest.raises(
        AdapterRejected, match=r"base_correction\.method: olora contradicts .*pissa"
    ):
        peft_base.read(
            write(peft_base, init_lora_weights="pissa", base_correction=correction("olora"))
        )


def test_pissa_needs_no_basis_but_the_canonical_one(peft_base: Any) -> None:
    weights = peft_base.read(write(peft_base, init_lora_weights="pissa"))
    assert weights.correction.basis_id == peft_base.canonical.id
    # Kept with the adapter: the cache it comes from may be lost.
    assert [basis.id for basis in peft_base.bases.all()] == [peft_base.canonical.id]


@pytest.mark.parametrize("method", ["milora", "olora"])
def test_one_basis_serves_every_adapter_of_a_method(
    peft_base: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(peft_base, base_correction=correction(method))
    first = peft_base.read(out, max_bases=1).correction
    made = load_basis(peft_base.folder / "bases" / f"{first.basis_id}.safetensors", peft_base.shape)
    assert (made.kind, made.base_digest) == (method, peft_base.shape.digest)
    assert set(made.factors) == set(peft_base.shape.targets())
    monkeypatch.setattr(corrections, "columns", None)  # nothing is computed again
    out = write(peft_base, rank=5, base_correction=correction(method))
    assert peft_base.read(out).correction.basis_id == first.basis_id
    peft_base.bases = BasisStore(peft_base.folder / "bases")  # as after a restart
    assert peft_base.read(out).correction.basis_id == first.basis_id


def test_bases_of_another_base_are_not_used(peft_base: Any) -> None:
    out = write(peft_base, base_correction=correction("olora"))
    first = peft_base.read(out).correction.basis_id
    shape = peft_base.shape
    peft_base.shape = type(shape)(shape.name, "1" * 64, shape.num_layers, shape.dims)
    assert peft_base.read(out).correction.basis_id != first


# ----------------------------------------------------------------------------- without a basis


def same(peft_base: Any, one: AdapterWeights, two: AdapterWeights) -> bool:
    x = torch.randn(4, 30)
    return all(
        torch.allclose(
            peft_base.output(one, t, x[:, : peft_base.shape.dims[t.module].d_in]),
            peft_base.output(two, t, x[:, : peft_base.shape.dims[t.module].d_in]),
            atol=1e-4,
        )
        for t in peft_base.shape.targets()
    )


@pytest.mark.parametrize("method", CORRECTION_METHODS)
def test_explicit_factors_do_the_same(
    peft_base: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = peft_base.read(write(peft_base, base_correction=correction(method)))
    with monkeypatch.context() as patched:
        patched.setattr(corrections, "shared_basis", lambda *_, **__: None)
        explicit = peft_base.read(write(peft_base, base_correction=correction(method)))
    assert explicit.correction is None
    assert explicit.rank == 6
    assert same(peft_base, shared, explicit)


def test_uploaded_bases_and_those_of_corrections_are_counted_apart(peft_base: Any) -> None:
    factor = torch.linalg.qr(torch.randn(30, 2)).Q
    digest = peft_base.shape.digest
    uploaded = [make_basis({Q0: f}, kind="uploaded", base_digest=digest) for f in (factor, -factor)]
    assert peft_base.bases.add(uploaded[0], limit=1)
    for method in ("milora", "olora"):
        out = write(peft_base, base_correction=correction(method))
        assert peft_base.read(out, max_bases=1).correction is not None
    assert not peft_base.bases.add(uploaded[1], limit=1)
    assert peft_base.bases.add(uploaded[1], limit=2)
    assert peft_base.read(write(peft_base, init_lora_weights="pissa"), max_bases=0).rank == 6


def test_rank_beyond_what_a_basis_may_have_is_explicit(
    peft_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "RANK_MAX", 32)
    weights = peft_base.read(write(peft_base, base_correction=correction("milora")))
    assert weights.correction is None
    assert not peft_base.bases.all()


def test_without_room_for_a_basis_it_is_explicit(
    peft_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(CORRECTION_METHODS) == BASES_MAX
    monkeypatch.setattr(corrections, "BASES_MAX", 1)
    assert peft_base.read(write(peft_base, base_correction=correction("milora"))).correction
    weights = peft_base.read(write(peft_base, base_correction=correction("olora")))
    assert weights.correction is None
    assert len(peft_base.bases.all()) == 1
    assert peft_base.read(write(peft_base, base_correction=correction("milora"))).correction


def test_explicit_factors_keep_to_the_limit(
    peft_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "RANK_MAX", 0)
    out = write(peft_base, base_correction=correction("milora", r=10))
    size = sum(file.stat().st_size for file in out.iterdir())
    with pytest.raises(AdapterTooLarge, match=r"with its milora correction the adapter takes \d+"):
        peft_base.read(out, max_bytes=2 * size)
    assert peft_base.read(out, max_bytes=6 * size).rank == 13


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_correction": {"method": "milora", "r": 11}}, "exceeds the 10 singular values"),
        ({"base_correction": {"method": "milora"}, "lora_alpha": 1e300}, "overflows"),
        ({"base_correction": {"method": "milora"}, "modules_to_save": ["x"]}, "modules_to_save"),
        ({"base_correction": {"method": "minor"}}, "minor must be pissa or milora or olora"),
        ({"base_correction": {"method": "milora", "r": True}}, r"base_correction\.r: must be"),
    ],
)
def test_what_is_refused_leaves_no_basis(
    peft_base: Any, config: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(write(peft_base, **config))
    assert not list((peft_base.folder / "bases").iterdir())


def test_scale_of_zero_still_takes_the_part_away(
    peft_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"base_correction": correction("milora"), "lora_alpha": 0}
    shared = peft_base.read(write(peft_base, **config))
    monkeypatch.setattr(corrections, "shared_basis", lambda *_, **__: None)
    explicit = peft_base.read(write(peft_base, **config))
    assert same(peft_base, shared, explicit)
    assert math.isfinite(explicit.scales[Q0])
    base = torch.randn(3, 21).double()
    w = peft_base.weights[Q0].double()
    assert not torch.allclose(peft_base.output(explicit, Q0, base), base @ w.T, atol=1e-3)
