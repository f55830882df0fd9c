"""Spectral adapters from upload to staged weights, and again after a restart."""

from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from tests.adapters.spectral_world import MLP, World, targets

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import BasisStore, compute_basis
from shoal.adapters.errors import AdapterNotFound, AdapterRejected, AdapterTooLarge
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
