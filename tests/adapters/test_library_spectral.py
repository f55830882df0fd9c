"""Spectral adapters from upload to staged weights, and again after a restart."""

import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from tests.adapters.spectral_world import MLP, World, targets
from torch import Tensor

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import BasisStore, compute_basis
from shoal.adapters.errors import AdapterNotFound, AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.container import read_tensors, tensor_chunks, write_atomically
from shoal.adapters.formats.writing import write_svf, write_svft
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary, places
from shoal.adapters.reading import adapter_files
from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.spec import Target
from shoal.adapters.spectral_basis import SpectralBasis


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Opened:
    """A library over the test's one registry, and what it told of."""

    def __init__(
        self, world: World, spectral: SpectralBasis | None, bytes_left: int | None = None
    ) -> None:
        self.told: list[Target] = []
        self.bank = AdapterBank(
            world.shape,
            capacity_bytes=1 << 20,
            device=torch.device("cpu"),
            dtype=torch.float32,
            spectral_bytes=bytes_left,
        )
        self.host = HostTier(1 << 20)
        url = f"sqlite:///{world.folder}/registry.db"
        self.library = AdapterLibrary.open(
            registry_url=url,
            store_url=None,
            shape=world.shape,
            weight_of=world.weight_of,
            canonical=compute_basis(world.weight_of, world.shape, 4),
            bases=BasisStore(places(url).bases),
            host=self.host,
            on_basis=self.bank.add_basis,
            dtype=torch.float32,
            reserved_names=frozenset(),
            max_upload_bytes=1 << 20,
            shipped=None,
            spectral=spectral,
            on_spectral=self.add,
        )

    def add(self, basis: SpectralBasis, asked: Collection[Target]) -> None:
        self.bank.add_spectral(basis, asked)
        self.told += asked


@pytest.fixture
def svf(world: World) -> Iterator[Path]:
    vectors = {t: torch.linspace(-2, 2, world.sizes(t)[2]) for t in targets(*MLP)}
    write_svf(world.folder / "svf", vectors, basis=world.basis)
    return world.folder / "svf"


def test_vectors_are_there_before_the_adapter_is(world: World, svf: Path) -> None:
    first = Opened(world, world.basis)
    info = first.library.upload("mine", adapter_files(svf))
    assert (info.family, info.format, info.rank) == ("spectral", "svf", 15)
    assert info.basis_id == world.basis.id
    assert first.told == targets(*MLP)
    spec = first.library.stage(info)
    kept = first.host.get(spec.digest).data
    first.library.close()

    second = Opened(world, world.basis)
    again = second.library.stage(second.library.resolve("mine"))
    assert again == spec
    assert second.told == targets(*MLP)
    assert torch.equal(second.host.get(again.digest).data, kept)
    second.library.close()


def test_what_finds_no_room_leaves_no_name(world: World, svf: Path) -> None:
    opened = Opened(world, world.basis, bytes_left=1000)
    with pytest.raises(AdapterTooLarge, match="singular vectors of 6 modules take"):
        opened.library.upload("mine", adapter_files(svf))
    with pytest.raises(AdapterNotFound):
        opened.library.resolve("mine")
    assert len(opened.host) == 0
    opened.library.close()


def test_nothing_is_computed_that_would_find_no_room(world: World, svf: Path) -> None:
    def admit(asked: Collection[Target]) -> None:
        opened.bank.check_spectral(asked)

    folder = world.folder / "fresh"
    basis = SpectralBasis(world.weight_of, world.shape, folder, admit=admit)
    opened = Opened(world, basis, bytes_left=1000)
    with pytest.raises(AdapterTooLarge, match=r"6 modules take \d+ bytes; 1000 are left"):
        opened.library.upload("mine", adapter_files(svf))
    assert not folder.exists()
    opened.library.close()


def test_a_server_without_vectors_refuses_and_says_what_would_help(world: World, svf: Path) -> None:
    opened = Opened(world, None)
    with pytest.raises(AdapterRejected, match="within --spectral-memory"):
        opened.library.upload("mine", adapter_files(svf))
    opened.library.close()


def test_it_cannot_stage_what_another_server_accepted(world: World, svf: Path) -> None:
    one = Opened(world, world.basis)
    one.library.upload("mine", adapter_files(svf))
    one.library.close()
    other = Opened(world, None)
    with pytest.raises(RecordDamaged, match=r"needs singular vectors svd-7777.*there are none"):
        other.library.stage(other.library.resolve("mine"))
    other.library.close()


def test_both_formats_share_vectors(world: World, svf: Path) -> None:
    entries = {
        t: (torch.tensor([1]).int(), torch.tensor([0]).int(), torch.ones(1))
        for t in targets("down_proj", "q_proj")
    }
    write_svft(world.folder / "svft", entries, basis=world.basis)
    one = 4 * 15 * (15 + 21)
    room = 6 * one + 2 * 4 * 15 * 30
    opened = Opened(world, world.basis, bytes_left=room)
    opened.library.upload("first", adapter_files(svf))
    opened.library.upload("second", adapter_files(world.folder / "svft"))
    assert opened.bank._spectral_left == 0
    opened.library.close()


# ------------------------------------------------ the vectors of a base that has several choices

Q = Target(1, "q_proj")
EQUAL, ZERO = (1, 2, 3), (13, 14)


@pytest.fixture
def degenerate(tmp_path: Path) -> World:
    """A world whose `Q` has three equal singular values and two that are zero."""
    world = World(tmp_path)
    u, _, vt = torch.linalg.svd(world.weights[Q].double())
    sigma = torch.linspace(2, 1, 15, dtype=torch.float64)
    sigma[list(EQUAL)], sigma[list(ZERO)] = 1.9, 0.0
    world.weights[Q] = (u * sigma @ vt).float()
    return world


def write(world: World, what: str) -> Path:
    """An adapter of `Q`."""
    folder = world.folder / what
    if what == "svf":
        write_svf(folder, {Q: torch.linspace(-2, 2, 15)}, basis=world.basis)
    elif what == "svf, equal alike":
        vector = torch.linspace(-2, 2, 15)
        vector[list(EQUAL)] = 0.5
        write_svf(folder, {Q: vector}, basis=world.basis)
    else:
        rows, columns = (2, 5) if what == "svft of equal" else (5, 14)
        places = torch.tensor([[0, rows], [4, columns]]).int()
        # Most of it is elsewhere.
        entries = {Q: (places[0], places[1], torch.tensor([1.0, 0.1]))}
        write_svft(folder, entries, basis=world.basis)
    return folder


def turn(world: World, how: str) -> None:
    """Replace the cache by another decomposition of the same weight, as right as the first."""
    (path,) = (world.folder / "svd-0").glob(f"*/{Q}.safetensors")
    if how == "untouched":
        return
    if how == "lost":
        shutil.rmtree(world.folder / "svd-0")
        return
    with path.open("rb") as file:
        tensors, metadata = read_tensors(file, path.stat().st_size, path.name)
    u, v = tensors["U"], tensors["V"]
    if how == "equal":
        turned = turn_of(3)
        u[:, list(EQUAL)] = u[:, list(EQUAL)] @ turned
        v[:, list(EQUAL)] = v[:, list(EQUAL)] @ turned
    elif how == "zero":
        v[:, list(ZERO)] = v[:, list(ZERO)] @ turn_of(2)
    elif how == "sign":
        u[:, 5] *= -1
        v[:, 5] *= -1
    write_atomically(path, tensor_chunks(tensors, metadata))
    kept = path.read_bytes()
    fresh(world).factors(Q)
    assert path.read_bytes() == kept, "is a valid decomposition"


def turn_of(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    turned: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return turned


def fresh(world: World) -> SpectralBasis:
    """As after a restart."""
    return SpectralBasis(world.weight_of, world.shape, world.folder / "svd-0")


def other_processes_record(world: World, what: str) -> Path:
    folder = write(world, what)
    first = Opened(world, fresh(world))
    first.library.upload("mine", adapter_files(folder))
    first.library.close()
    return folder


@pytest.mark.parametrize(
    ("what", "how", "told"),
    [
        ("svf", "equal", False),
        ("svft of zero", "zero", False),
        # The file tells its U by probes.
        ("svft of equal", "equal", True),
        ("svft of equal", "sign", True),
    ],
)
def test_vectors_that_would_change_an_adapter_are_not_used_for_it(
    degenerate: World, what: str, how: str, told: bool
) -> None:
    folder = other_processes_record(degenerate, what)
    turn(degenerate, how)
    opened = Opened(degenerate, fresh(degenerate))
    before = opened.library.resolve("mine")
    with pytest.raises(
        RecordDamaged,
        match=r"singular vectors are no longer those that .* read with: on layers\.1\.q_proj "
        r".*uploading the adapter again mends it, or",
    ):
        opened.library.stage(before)
    assert len(opened.host) == 0

    if told:
        with pytest.raises(AdapterRejected, match="with other singular vectors of it"):
            opened.library.upload("mine", adapter_files(folder))
        opened.library.close()
        return
    after = opened.library.upload("mine", adapter_files(folder))
    assert (before.version, after.version) == (1, 2)
    opened.library.close()
    again = Opened(degenerate, fresh(degenerate))
    again.library.stage(again.library.resolve("mine"))
    with pytest.raises(RecordDamaged, match="no longer"):
        again.library.stage(before)
    again.library.close()


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("svf", "untouched"),
        ("svft of equal", "untouched"),
        ("svf", "lost"),
        ("svft of equal", "lost"),
        ("svft of zero", "lost"),
        # Other vectors, but the same change.
        ("svf", "sign"),
        ("svf", "zero"),
        ("svf, equal alike", "equal"),
        ("svft of equal", "zero"),
        ("svft of zero", "equal"),
    ],
)
def test_vectors_that_leave_an_adapter_what_it_is_are_used(
    degenerate: World, what: str, how: str
) -> None:
    folder = other_processes_record(degenerate, what)
    turn(degenerate, how)
    opened = Opened(degenerate, fresh(degenerate))
    opened.library.stage(opened.library.resolve("mine"))
    if how in ("untouched", "lost"):
        assert opened.library.upload("mine", adapter_files(folder)).version == 1
    opened.library.close()


def test_what_counts_are_the_vectors_that_serve(degenerate: World) -> None:
    """A cache that is replaced under a running server, behind what it remembers."""
    folder = write(degenerate, "svf")
    basis = fresh(degenerate)
    opened = Opened(degenerate, basis)
    basis.ends(Q)
    turn(degenerate, "equal")
    with pytest.raises(RecordDamaged, match="no longer"):
        opened.library.upload("mine", adapter_files(folder))
    with pytest.raises(AdapterNotFound):
        opened.library.resolve("mine")
    opened.library.upload("mine", adapter_files(folder))
    opened.library.close()
