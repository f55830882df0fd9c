"""LoRA-XS: both layouts, and which basis an adapter is put on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.adapters.basis import Basis, BasisStore, compute_basis, make_basis, probe
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import core
from shoal.adapters.formats.writing import write_compact_lora_xs, write_official_lora_xs
from shoal.adapters.record import from_record, record_digest, to_record
from shoal.adapters.spec import Target
from shoal.kernels.core_apply import kernel as core_apply_kernel

Q0 = Target(0, "q_proj")
Q0_NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def make_r(golden: Any, rank: int = 4) -> dict[Target, Tensor]:
    dims = golden.shape.dims
    sizes = {t: min(rank, *dims[t.module]) for t in golden.shape.targets()}
    return {t: torch.randn(k, k) for t, k in sizes.items()}


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def write_official(golden: Any, factors: dict[Target, Tensor], r: dict[Target, Tensor]) -> Path:
    """An official file with any factors B."""
    basis = make_basis(factors, kind="uploaded", base_digest="x")
    path: Path = golden.folder / "official"
    write_official_lora_xs(
        path,
        r,
        alpha=8,
        rank=4,
        basis=basis,
        shape=golden.shape,
        weight_of=golden.weight_of,
    )
    return path


# ------------------------------------------------------------------------------------- official


@pytest.mark.parametrize("case", ["xs_new_key", "xs_old_key", "xs_rank_8"])
def test_official_file_gives_the_delta_of_its_own_factors(golden: Any, case: str) -> None:
    weights = golden.read(golden.copy(case))
    assert (weights.format, weights.family) == ("lora_xs", "core")
    golden.assert_delta(weights, case)


@pytest.mark.parametrize("case", ["xs_new_key", "xs_old_key", "xs_rank_8"])
def test_official_file_is_exact_without_room_for_its_basis(golden: Any, case: str) -> None:
    weights = golden.read(golden.copy(case), max_bases=0)
    if weights.family == "core":  # the randomised SVD may have converged to the canonical span
        assert weights.basis_id == golden.canonical.id
    else:
        assert weights.basis_id is None
    golden.assert_delta(weights, case)
    assert golden.bases.all() == ()


def test_factors_that_are_not_those_of_the_base_are_kept_explicitly(golden: Any) -> None:
    weights = golden.read(golden.copy("xs_alike"))
    assert (weights.format, weights.family, weights.basis_id) == ("lora_xs", "lora", None)
    golden.assert_delta(weights, "xs_alike")
    assert golden.bases.all() == ()


def test_slightly_wrong_a_is_kept_explicitly(golden: Any) -> None:
    factors = {t: golden.canonical.factors[t][:, :4] for t in golden.shape.targets()}
    path = write_official(golden, factors, make_r(golden))
    assert golden.read(path).family == "core"
    tensors = golden.tensors(path)
    a = tensors[f"{Q0_NAME}.lora_A.weight"]
    tensors[f"{Q0_NAME}.lora_A.weight"] = a + 1e-3 * a.norm() / 8 * torch.randn_like(a)
    assert golden.read(golden.save(path, tensors)).family == "lora"


def test_b_that_is_not_orthonormal_is_kept_explicitly(golden: Any) -> None:
    factors = {t: golden.canonical.factors[t][:, :4] for t in golden.shape.targets()}
    factors[Q0] = factors[Q0] * 1.1
    weights = golden.read(write_official(golden, factors, make_r(golden)))
    assert weights.family == "lora"


def test_canonical_factors_keep_r_as_it_is(golden: Any) -> None:
    r = make_r(golden)
    factors = {t: golden.canonical.factors[t][:, :4] for t in golden.shape.targets()}
    weights = golden.read(write_official(golden, factors, r))
    assert (weights.family, weights.basis_id) == ("core", golden.canonical.id)
    assert all(torch.equal(weights.tensors[t][0], r[t]) for t in r)
    assert set(weights.scales.values()) == {2.0}
    assert golden.bases.all() == ()


def test_rotated_factors_are_rotated_back(golden: Any) -> None:
    r = make_r(golden)
    factors = {t: (golden.canonical.factors[t][:, :4].double() @ rotation(4)).float() for t in r}
    weights = golden.read(write_official(golden, factors, r))
    assert (weights.family, weights.rank, weights.basis_id) == ("core", 4, golden.canonical.id)
    for t, b in factors.items():
        own = 2.0 * b.double() @ r[t].double() @ b.double().T @ golden.weights[t].double()
        assert (golden.delta(weights, t) - own).norm() < 1e-5 * own.norm()


def test_span_in_later_columns_takes_only_the_rank_it_needs(golden: Any) -> None:
    r = make_r(golden)
    factors = {t: golden.canonical.factors[t][:, [0, 1, 2, 4]] for t in r}
    weights = golden.read(write_official(golden, factors, r))
    assert (weights.family, weights.basis_id) == ("core", golden.canonical.id)
    assert {parts[0].shape for parts in weights.tensors.values()} == {(5, 5)}
    b = factors[Q0].double()
    own = 2.0 * b @ r[Q0].double() @ b.T @ golden.weights[Q0].double()
    assert (golden.delta(weights, Q0) - own).norm() < 1e-5 * own.norm()


def test_nearly_spanning_factors_get_their_own_basis(golden: Any) -> None:
    r = make_r(golden)
    factors = {t: golden.canonical.factors[t][:, :4].clone() for t in r}
    outside = torch.randn(16, dtype=torch.float64)
    known = golden.canonical.factors[Q0].double()
    outside -= known @ (known.T @ outside)
    # ‖QᵀQ − I‖ is 4e-6 here, yet 0.2 % of the column lies outside the canonical span.
    column = factors[Q0][:, 3].double() + 2e-3 * outside / outside.norm()
    factors[Q0][:, 3] = (column / column.norm()).float()
    weights = golden.read(write_official(golden, factors, r))
    assert weights.family == "core"
    assert weights.basis_id != golden.canonical.id


def test_files_of_the_same_factors_share_one_basis_and_others_add_theirs(golden: Any) -> None:
    one = golden.read(golden.copy("xs_new_key"))
    two = golden.read(golden.copy("xs_old_key"))
    assert one.basis_id == two.basis_id
    assert to_record(one) == to_record(two)
    before = len(golden.bases.all())
    factors = {t: rotation(16)[:, :4].float() for t in (Q0, Target(1, "down_proj"))}
    r = {t: torch.randn(4, 4) for t in factors}
    path = write_official(golden, factors, r)
    partial = golden.read(path)
    assert set(partial.tensors) == set(factors)
    assert len(golden.bases.all()) == before + 1
    basis = golden.bases.get(partial.basis_id)
    assert (basis.kind, set(basis.factors), basis.rank) == ("uploaded", set(factors), 4)
    again = BasisStore(golden.folder / "bases")  # durable before the adapter is
    assert again.get(partial.basis_id) is not None
    assert golden.read(path, max_bases=0).basis_id == partial.basis_id  # known ones need no room


def test_no_more_than_max_bases_are_added(golden: Any) -> None:
    families = []
    for _ in range(4):
        factors = {Q0: rotation(16)[:, :4].float()}
        weights = golden.read(write_official(golden, factors, {Q0: torch.randn(4, 4)}), max_bases=2)
        families.append(weights.family)
    assert families == ["core", "core", "lora", "lora"]
    assert len(golden.bases.all()) == len(files_in(golden.folder / "bases")) == 2


def test_a_rank_that_no_kernel_takes_is_kept_explicitly(
    golden: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the adapter would be accepted, and fail every step that it is in."""
    factors = {Q0: rotation(16)[:, :4].float()}
    path = write_official(golden, factors, {Q0: torch.randn(4, 4)})
    monkeypatch.setattr(core, "RANK_MAX", 3)
    assert golden.read(path).family == "lora"
    assert golden.bases.all() == ()
    monkeypatch.setattr(core, "RANK_MAX", 4)
    assert golden.read(path).family == "core"


def test_the_largest_rank_is_one_that_the_kernels_take() -> None:
    assert core.RANK_MAX <= core_apply_kernel.MAX_RANK


@pytest.mark.parametrize(("dtype", "family"), [(torch.float16, "core"), (torch.bfloat16, "lora")])
def test_half_precision_factors_are_used_as_they_are(
    golden: Any, dtype: torch.dtype, family: str
) -> None:
    case = golden.copy("xs_new_key")
    rounded = {n: t.to(dtype) for n, t in golden.tensors(case).items()}
    weights = golden.read(golden.save(case, rounded))
    assert weights.family == family
    for target in weights.tensors:
        name = f"base_model.model.model.layers.{target.layer}."
        a, b, r = (
            next(
                t for n, t in rounded.items() if n.startswith(name) and f"{target.module}.{k}" in n
            )
            for k in ("lora_A", "lora_B", "default_lora_latent")
        )
        own = 2.0 * b.double() @ r.double() @ a.double()
        error = (golden.delta(weights, target) - own).norm() / own.norm()
        assert error < (1e-6 if family == "lora" else 1e-3)


def test_rslora_and_patterns_apply_to_official_files(golden: Any) -> None:
    case = golden.edit_config(
        golden.copy("xs_new_key"), use_rslora=True, lora_alpha=3, alpha_pattern={"q_proj": 5}
    )
    scales = golden.read(case).scales
    assert scales[Q0] == 5 / 2
    assert scales[Target(0, "k_proj")] == 3 / 2


@pytest.mark.parametrize(
    ("kind", "replacement", "message"),
    [
        ("lora_A.weight", None, r"q_proj\.lora_A: is missing"),
        ("lora_B.weight", None, r"q_proj\.lora_B: is missing"),
        ("default_lora_latent_mapping.weight", None, "latent_mapping: is missing"),
        ("lora_A.weight", torch.zeros(4, 17), r"shape \[4, 17\] must be \[4, 16\]"),
        ("lora_B.weight", torch.zeros(16, 5), r"shape \[16, 5\] must be \[16, 4\]"),
        ("default_lora_latent_mapping.weight", torch.zeros(4, 5), r"must be \[4, 4\]"),
        ("default_lora_latent_mapping.weight", torch.zeros(17, 17), "rank 17 must be at most 16"),
        ("default_lora_latent_mapping.weight", torch.zeros(4), "two axes"),
        ("basis_probe", torch.zeros(4, 4), "basis_probe: does not belong to peft_type LORA"),
        ("lora_magnitude_vector", torch.zeros(16), "lora_magnitude_vector: DoRA"),
        ("lora_C.weight", torch.zeros(4, 4), "lora_C.* is not a tensor of a lora_xs adapter"),
    ],
)
def test_bad_official_tensor_is_refused_and_leaves_nothing(
    golden: Any, kind: str, replacement: Tensor | None, message: str
) -> None:
    case = golden.copy("xs_new_key")
    tensors = golden.tensors(case)
    tensors.pop(f"{Q0_NAME}.{kind}", None)
    if replacement is not None:
        tensors[f"{Q0_NAME}.{kind}"] = replacement
    with pytest.raises(AdapterRejected, match=message):
        golden.read(golden.save(case, tensors))
    assert golden.bases.all() == ()
    assert files_in(golden.folder / "bases") == []


def test_late_refusal_leaves_no_basis(golden: Any) -> None:
    factors = {Q0: rotation(16)[:, :4].float()}
    path = write_official(golden, factors, {Q0: torch.full((4, 4), 3e38)})
    with pytest.raises(AdapterRejected, match="overflows"):
        golden.read(path)
    assert files_in(golden.folder / "bases") == []


# -------------------------------------------------------------------------------------- compact


@pytest.fixture
def compact(golden: Any) -> Path:
    """A compact adapter on the canonical basis; its rank exceeds no module's."""
    path: Path = golden.folder / "compact"
    write_compact_lora_xs(
        path,
        make_r(golden),
        alpha=6,
        rank=4,
        basis=golden.canonical,
        shape=golden.shape,
        extra_config={"base_correction": None, "seed": 3},
    )
    return path


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_what_is_written_is_read_back(golden: Any, rank: int) -> None:
    r = make_r(golden, rank)
    arguments = {"alpha": 3, "rank": rank, "basis": golden.canonical, "shape": golden.shape}
    write_compact_lora_xs(golden.folder / "a", r, **arguments)
    write_official_lora_xs(golden.folder / "b", r, weight_of=golden.weight_of, **arguments)
    one, two = golden.read(golden.folder / "a"), golden.read(golden.folder / "b")
    assert to_record(one) == to_record(two)
    assert (one.family, one.rank, one.basis_id) == ("core", rank, golden.canonical.id)
    assert all(torch.equal(one.tensors[t][0], r[t]) for t in r)
    assert set(one.scales.values()) == {3 / rank}


def test_rank_above_a_modules_size_keeps_one_scale(golden: Any) -> None:
    canonical = compute_basis(golden.weight_of, golden.shape, 12)
    golden.canonical = canonical
    r = make_r(golden, 12)
    assert {len(each) for each in r.values()} == {8, 12}  # k and v have 8 outputs
    arguments = {"alpha": 3, "rank": 12, "basis": canonical, "shape": golden.shape}
    write_compact_lora_xs(golden.folder / "a", r, **arguments)
    write_official_lora_xs(golden.folder / "b", r, weight_of=golden.weight_of, **arguments)
    one, two = golden.read(golden.folder / "a"), golden.read(golden.folder / "b")
    assert set(one.scales.values()) == {0.25}
    assert to_record(one) == to_record(two)


def test_compact_file_is_small_and_names_its_basis(golden: Any, compact: Path) -> None:
    config = json.loads((compact / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA_XS"
    assert config["basis"] == {"id": golden.canonical.id, "base_digest": "d" * 64, "rank": 8}
    assert config["seed"] == 3
    assert {
        n.rsplit("q_proj.")[1] for n in golden.tensors(compact) if "0.self_attn.q_proj" in n
    } == {
        "lora_latent_mapping.weight",
        "basis_probe",
    }


def test_basis_computed_elsewhere_is_recognised_by_its_probes(golden: Any, compact: Path) -> None:
    config = json.loads((compact / "adapter_config.json").read_text())
    golden.edit_config(compact, basis=config["basis"] | {"id": "0" * 64, "base_digest": "e" * 64})
    assert golden.read(compact).basis_id == golden.canonical.id


def test_compact_file_may_use_an_uploaded_basis(golden: Any) -> None:
    factors = {Q0: rotation(16)[:, :4].float()}
    basis = make_basis(factors, kind="uploaded", base_digest="d" * 64)
    golden.bases.add(basis)
    write_compact_lora_xs(
        golden.folder / "a",
        {Q0: torch.eye(3)},
        alpha=3,
        rank=3,
        basis=basis,
        shape=golden.shape,
    )
    assert golden.read(golden.folder / "a").basis_id == basis.id


def test_the_basis_of_another_base_is_no_basis_of_this_one(golden: Any) -> None:
    # Two bases of one shape share a registry; on the other's weights the adapter says nothing here.
    others = {t: torch.randn_like(w) for t, w in golden.weights.items()}
    shape = replace(golden.shape, digest="e" * 64)
    theirs = compute_basis(others.__getitem__, shape, 8)
    golden.bases.add(theirs)
    for i in range(4):  # nor do the other's uploaded bases take room here
        golden.bases.add(
            make_basis({Q0: rotation(16)[:, : i + 1]}, kind="uploaded", base_digest=shape.digest)
        )
    path = golden.folder / "a"
    r = {Q0: torch.eye(3)}
    write_compact_lora_xs(path, r, alpha=3, rank=3, basis=theirs, shape=shape)
    with pytest.raises(AdapterRejected, match=r"q_proj\.basis_probe: does not match"):
        golden.read(path)
    factors = {Q0: rotation(16)[:, :4].float()}
    official = golden.read(write_official(golden, factors, {Q0: torch.eye(4)}), max_bases=1)
    assert official.family == "core"


@pytest.mark.parametrize("known", [True, False])
def test_probe_of_another_basis_is_an_error_not_a_guess(
    golden: Any, compact: Path, known: bool
) -> None:
    if not known:
        golden.edit_config(compact, basis={"id": "0" * 64})
    tensors = golden.tensors(compact)
    flipped = golden.canonical.factors[Q0][:, :4].clone()
    flipped[:, 2] *= -1
    tensors[f"{Q0_NAME}.basis_probe"] = probe(flipped, Q0)
    with pytest.raises(AdapterRejected, match=r"q_proj\.basis_probe: does not match"):
        golden.read(golden.save(compact, tensors))


def test_probe_tolerates_rounding_only(golden: Any, compact: Path) -> None:
    tensors = golden.tensors(compact)
    name = f"{Q0_NAME}.basis_probe"
    exact = tensors[name].clone()
    tensors[name] = exact * (1 + 9e-4)
    golden.read(golden.save(compact, tensors))
    tensors[name] = exact * (1 + 1.1e-3)
    with pytest.raises(AdapterRejected, match="allowed 1e-03"):
        golden.read(golden.save(compact, tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_16_bits_is_on_its_basis_and_no_other(
    golden: Any, compact: Path, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in golden.tensors(compact).items()}
    assert golden.read(golden.save(compact, tensors)).basis_id == golden.canonical.id
    swapped = golden.canonical.factors[Q0][:, [0, 1, 3, 2]]
    tensors[f"{Q0_NAME}.basis_probe"] = probe(swapped, Q0).to(dtype)
    with pytest.raises(AdapterRejected, match=r"q_proj\.basis_probe: does not match"):
        golden.read(golden.save(compact, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 5}, r"lora_latent_mapping\.weight: shape \[4, 4\] must be \[5, 5\]"),
        ({"basis": None}, "basis: must be an object"),
        ({"basis": {"id": 3}}, "basis: must be an object"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"base_correction": {"method": "pissa", "r": 4}}, "base_correction"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora: DoRA is served with plain LoRA only"),
        ({"alpha_pattern": {"q_proj": 80}}, "alpha_pattern: must be absent"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: must be absent"),
        ({"peft_type": "LORA"}, "does not belong to peft_type LORA"),
        ({"peft_type": "MISS"}, "peft_type: is MISS"),
    ],
)
def test_compact_config_is_checked(
    golden: Any, compact: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterRejected, match=message):
        golden.read(golden.edit_config(compact, **changes))


@pytest.mark.parametrize("kind", ["basis_probe", "lora_latent_mapping.weight"])
def test_compact_file_needs_both_tensors_of_every_module(
    golden: Any, compact: Path, kind: str
) -> None:
    tensors = golden.tensors(compact)
    del tensors[f"{Q0_NAME}.{kind}"]
    with pytest.raises(AdapterRejected, match=rf"q_proj\.{kind.split('.')[0]}: is missing"):
        golden.read(golden.save(compact, tensors))


def test_rank_beyond_the_known_basis_is_refused(golden: Any) -> None:
    larger = compute_basis(golden.weight_of, golden.shape, 12)
    write_compact_lora_xs(
        golden.folder / "a",
        make_r(golden, 12),
        alpha=1,
        rank=12,
        basis=larger,
        shape=golden.shape,
    )
    with pytest.raises(AdapterRejected, match=r"its rank is 8, the adapter's 12"):
        golden.read(golden.folder / "a")


def test_same_content_has_one_digest_whatever_the_file_looks_like(
    golden: Any, compact: Path
) -> None:
    digest = record_digest(to_record(golden.read(compact)))
    config = json.loads((compact / "adapter_config.json").read_text())
    (compact / "adapter_config.json").write_text(json.dumps({"extra": 1, **config}, indent=7))
    golden.save(compact, dict(reversed(golden.tensors(compact).items())))
    weights = golden.read(compact)
    assert record_digest(to_record(weights)) == digest
    again = from_record(to_record(weights), golden.shape)
    assert record_digest(to_record(again)) == digest
    golden.edit_config(compact, lora_alpha=6.000001)
    assert record_digest(to_record(golden.read(compact))) != digest


def test_canonical_basis_in_the_store_is_not_counted_twice(golden: Any, compact: Path) -> None:
    golden.bases.add(golden.canonical)
    assert golden.read(compact).basis_id == golden.canonical.id
    weights = golden.read(golden.copy("xs_alike"), max_bases=1)
    assert weights.family == "lora"
    assert isinstance(golden.bases.get(golden.canonical.id), Basis)
