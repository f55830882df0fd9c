"""SVFT files against the paper's equation, on a decomposition of the test's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.adapters.spectral_world import Array, World, assert_close, key, targets
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import spectral as family
from shoal.adapters.formats import svft
from shoal.adapters.formats.writing import write_svft
from shoal.adapters.record import from_record, to_record
from shoal.adapters.spec import Target

DOWN, GATE, K = Target(1, "down_proj"), Target(0, "gate_proj"), Target(0, "k_proj")
Entries = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def decomposed(world: World, target: Target) -> tuple[Array, Array, Array]:
    """U, σ and Vᵀ of a weight, each pair of vectors with the sign that the format asks for.

    The sign comes from the base's vectors, everything else from NumPy.
    """
    u, sigma, vt = np.linalg.svd(world.w(target), full_matrices=False)
    along = (np.asarray(world.basis.factors(target).u.double()) * u).sum(0)
    assert (np.abs(along) > 1 - 1e-6).all()
    return u * np.sign(along), sigma, vt * np.sign(along)[:, None]


def pattern(name: str, n: int, d: int, seed: int) -> Entries:
    """The patterns of the paper; ``random`` has duplicates."""
    generator = torch.Generator().manual_seed(seed)
    banded = [(i, j) for i in range(n) for j in range(n) if abs(i - j) <= d]
    if name == "plain":
        banded = [(i, i) for i in range(n)]
    rows, columns = (torch.tensor(part) for part in zip(*banded, strict=True))
    if name == "random":
        rows = torch.randint(n, rows.shape, generator=generator)
        columns = torch.randint(n, columns.shape, generator=generator)
    elif name == "top_k":
        score = torch.randn(n * n, generator=generator)
        places = score.topk(len(banded)).indices  # in no order
        rows, columns = places // n, places % n
    values = torch.randn(len(rows), generator=generator)
    return rows.int(), columns.int(), values


def dense(entries: Entries, n: int) -> Array:
    m = np.zeros((n, n))
    for row, column, value in zip(*(part.tolist() for part in entries), strict=True):
        m[row, column] += value
    return m


def sigmoid(gate: Tensor) -> float:
    return 1 / (1 + float(np.exp(-float(gate.double()))))


@pytest.mark.parametrize("name", ["plain", "banded", "random", "top_k"])
def test_every_pattern(world: World, name: str) -> None:
    given = {t: pattern(name, world.sizes(t)[2], 2, i) for i, t in enumerate(targets())}
    gates = {t: torch.tensor([0.3 * i - 1]) for i, t in enumerate(given)}
    write_svft(world.folder / "out", given, basis=world.basis, gates=gates)
    weights = world.read(world.folder / "out")
    assert (weights.format, weights.family, weights.basis_id) == (
        "svft",
        "spectral",
        world.basis.id,
    )
    for target, entries in given.items():
        u, sigma, vt = decomposed(world, target)
        m = dense(entries, len(sigma))
        want = u @ (np.diag(sigma) + sigmoid(gates[target]) * m) @ vt
        assert_close(world.merged(weights, target), want)
        assert len(weights.tensors[target][2]) == len(
            {*zip(entries[0].tolist(), entries[1].tolist(), strict=True)}
        )


def test_random_patterns_have_duplicates() -> None:
    """Or the test above shows nothing of their sum."""
    rows, columns, _ = pattern("random", 15, 2, 0)
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) < len(rows)


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize("target", [DOWN, GATE, K])
def test_a_smaller_rank_discards_the_rest_of_the_weight(
    world: World, rank: int, target: Target
) -> None:
    u, sigma, vt = decomposed(world, target)
    entries = pattern("banded", rank, 1, rank)
    s_pre, gate = torch.tensor(sigma[:rank]).float(), torch.tensor([0.7])
    write_svft(
        world.folder / "out",
        {target: entries},
        basis=world.basis,
        gates={target: gate},
        s_pre={target: s_pre},
    )
    weights = world.read(world.folder / "out")
    inner = np.diag(np.asarray(s_pre.double())) + sigmoid(gate) * dense(entries, rank)
    want = u[:, :rank] @ inner @ vt[:rank]
    assert np.linalg.matrix_rank(want) == rank
    assert_close(world.merged(weights, target), want)


def test_other_singular_values_are_those_of_the_file(world: World) -> None:
    """All of them, but not the base's: rounded to 16 bits, say."""
    u, sigma, vt = decomposed(world, DOWN)
    s_pre = torch.tensor(sigma).bfloat16()
    entries = pattern("banded", 15, 1, 0)
    write_svft(world.folder / "out", {DOWN: entries}, basis=world.basis, s_pre={DOWN: s_pre})
    weights = world.read(world.folder / "out")
    want = u @ (np.diag(np.asarray(s_pre.double())) + dense(entries, 15)) @ vt
    assert_close(world.merged(weights, DOWN), want)


def test_the_bases_own_singular_values_cost_nothing(world: World) -> None:
    entries = {DOWN: (torch.tensor([2]).int(), torch.tensor([9]).int(), torch.tensor([0.5]))}
    write_svft(world.folder / "a", entries, basis=world.basis)
    _, sigma, _ = decomposed(world, DOWN)
    s_pre = {DOWN: torch.tensor(sigma).float()}
    write_svft(world.folder / "b", entries, basis=world.basis, s_pre=s_pre)
    assert to_record(world.read(world.folder / "a")) == to_record(world.read(world.folder / "b"))
    assert world.read(world.folder / "b").rank == 1


def test_without_a_gate_values_are_final(world: World) -> None:
    entries = pattern("top_k", 15, 1, 3)
    write_svft(world.folder / "a", {DOWN: entries}, basis=world.basis)
    halves = (*entries[:2], entries[2] * 2)
    write_svft(world.folder / "b", {DOWN: halves}, basis=world.basis, gates={DOWN: torch.zeros(1)})
    assert to_record(world.read(world.folder / "a")) == to_record(world.read(world.folder / "b"))


def test_zeros_are_entries(world: World) -> None:
    entries = (torch.tensor([3, 3]).int(), torch.tensor([4, 4]).int(), torch.tensor([1.0, -1.0]))
    write_svft(world.folder / "out", {DOWN: entries}, basis=world.basis)
    weights = world.read(world.folder / "out")
    assert_close(world.merged(weights, DOWN), world.w(DOWN), 1e-12)
    assert to_record(from_record(to_record(weights), world.shape)) == to_record(weights)


# ------------------------------------------------------------------------------------ refusals


def by_hand(world: World, **changes: Tensor | None) -> Path:
    parts: dict[str, Tensor | None] = {
        "svft_rows": torch.tensor([0, 14]).int(),
        "svft_cols": torch.tensor([3, 0]).int(),
        "svft_values": torch.tensor([1.0, 2.0]),
        "svd_probe": world.basis.probe(DOWN),
        **changes,
    }
    tensors = {key(DOWN, kind): part for kind, part in parts.items() if part is not None}
    return world.save({"peft_type": "SVFT"}, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"svft_rows": torch.tensor([0, 15]).int()},
            "svft_rows: holds 15, must be within 0",
        ),
        (
            {"svft_cols": torch.tensor([-1, 5]).int()},
            "svft_cols: holds -1, must be within 0",
        ),
        ({"svft_cols": torch.tensor([1]).int()}, r"svft_cols: shape \[1\] must be \[2\]"),
        (
            {"svft_cols": torch.tensor([1.0, 2.0])},
            "svft_cols: is torch.float32, must hold int",
        ),
        ({"svft_rows": torch.tensor([0, 14])}, "svft_rows: dtype I64 must be one of"),
        ({"svft_rows": None}, "svft_rows: is missing"),
        ({"svft_values": torch.ones(2, 1)}, r"svft_values: shape \[2, 1\] must be \[2\]"),
        (
            {"svft_values": torch.tensor([1, 2]).int()},
            "svft_values: is torch.int32, must",
        ),
        ({"svft_gate": torch.zeros(2)}, r"svft_gate: shape \[2\] must be \[1\]"),
        ({"svft_s_pre": torch.ones(16)}, "svft_s_pre: has 16 values, must have at most .* = 15"),
        ({"svft_s_pre": torch.ones(14)}, "svft_rows: holds 14, must be within 0 and 13"),
        ({"svft_s_pre": torch.ones(2, 2)}, r"svft_s_pre: shape \[2, 2\] must be \[4\]"),
        ({"svd_probe": None}, "svd_probe: is missing: nothing says"),
        ({"svd_probe": torch.zeros(15)}, r"svd_probe: shape \[15\] must be \[15, 4\]"),
        ({"bias": torch.zeros(15)}, "bias: biases are not served"),
        ({"svft_layer": torch.zeros(15)}, "svft_layer: is not a tensor of a svft adapter"),
    ],
)
def test_what_is_wrong_is_named(world: World, changes: dict[str, Any], message: str) -> None:
    world.read(by_hand(world))
    with pytest.raises(AdapterRejected, match=message):
        world.read(by_hand(world, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_signs_are_refused(world: World, dtype: torch.dtype) -> None:
    """One flipped column would change entries of M off the diagonal, silently."""
    probe = world.basis.probe(DOWN).clone().to(dtype)
    world.read(by_hand(world, svd_probe=probe))
    probe[7] *= -1
    with pytest.raises(AdapterRejected, match=r"svd_probe: differs by .* at component 7"):
        world.read(by_hand(world, svd_probe=probe))


def test_two_orders_of_the_same_vectors_are_refused(world: World) -> None:
    probe = world.basis.probe(DOWN).clone()
    probe[[3, 4]] = probe[[4, 3]]
    with pytest.raises(AdapterRejected, match=r"svd_probe: differs by .* at component [34]"):
        world.read(by_hand(world, svd_probe=probe))


def test_a_matrix_of_too_many_entries_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svft, "ENTRIES_PER_COMPONENT", 2)
    assert family.ENTRIES_PER_COMPONENT > 2
    world.read(by_hand(world))
    rows, columns, values = pattern("banded", 15, 2, 0)
    changes = {"svft_rows": rows, "svft_cols": columns, "svft_values": values}
    with pytest.raises(AdapterRejected, match=r"stands for 69 entries of M, .* may have 30"):
        world.read(by_hand(world, **changes))
