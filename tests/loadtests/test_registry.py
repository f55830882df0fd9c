"""``shoal bench archive`` and ``shoal bench registry``, on a tiny base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.adapters.base import base_digest
from shoal.adapters.record import from_record
from shoal.adapters.registry.archive import BATCH_ADAPTERS
from shoal.adapters.registry.registry import Registry
from shoal.server.__main__ import main
from shoal.server.model.config import ModelConfig
from shoal.server.model.dummy import random_decoder
from shoal.server.model.shapes import SHAPES

SHAPE = SHAPES["tiny"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with random weights, of which nothing has been computed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "base"
    folder.mkdir()
    config = ModelConfig.from_hf(SHAPE)
    decoder = random_decoder(config, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) for n, s in decoder.weight_shapes().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(SHAPE)))
    return folder


def test_what_is_made_is_imported_measured_and_can_be_served(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, url = str(tmp_path / "a.tar"), f"sqlite:///{tmp_path}/r.db"
    words = ["bench", "archive", tar, "--model", str(base), "--rank", "2", "--basis-rank", "8"]
    assert main([*words, "--adapters", "60"]) == 0
    assert main([*words, "--adapters", "60"]) == 2  # never over a file
    assert main(["adapters", "import", tar, "--registry", url]) == 0
    assert main(["doctor", "--registry", url]) == 0
    shape = ModelConfig.from_hf(SHAPE).base_shape("base", base_digest(base))
    registry = Registry.open(url, base_digest=shape.digest)
    infos, following = registry.page(limit=100)
    assert [info.name for info in infos] == [f"u{n:07}" for n in range(60)]
    assert following is None
    drawn = set()
    for info in infos:
        weights = from_record(registry.read(info.digest), shape)
        assert (weights.family, weights.rank, weights.basis_id) == ("core", 2, info.basis_id)
        assert set(weights.tensors) == set(shape.targets())
        assert info.packed_elements == len(shape.targets()) * 4
        drawn |= {tuple(r.flatten().tolist()) for (r,) in weights.tensors.values()}
    assert len(drawn) == 60 * len(shape.targets())  # no two matrices are alike
    registry.close()
    capsys.readouterr()
    words = ["bench", "registry", "--registry", url, "--lookups", "120", "--threads", "2"]
    assert main([*words, "--model", str(base)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["adapters"], figures["backend"]) == (60, "sqlite")
    assert figures["times"]["look-up"]["calls"] == 120
    assert {"record from the store", "cold load"} < figures["times"].keys()
    assert main([*words, "--fill", "10"]) == 2


def test_the_first_adapters_do_not_depend_on_how_many_follow(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.server.dummy_archive.BATCH_ADAPTERS", 7)
    assert BATCH_ADAPTERS > 7
    digests = []
    for count, seed in ((5, 0), (20, 0), (5, 1)):
        tar, url = str(tmp_path / f"{count}{seed}.tar"), f"sqlite:///{tmp_path}/{count}{seed}.db"
        words = ["bench", "archive", tar, "--model", str(base), "--basis-rank", "8"]
        assert main([*words, "--adapters", str(count), "--seed", str(seed)]) == 0
        assert main(["adapters", "import", tar, "--registry", url]) == 0
        registry = Registry.open(url, base_digest=base_digest(base))
        digests.append([info.digest for info in registry.page(limit=5)[0]])
        registry.close()
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_a_rank_that_does_not_fit_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "archive", str(tmp_path / "a.tar"), "--model", str(base)]
    assert main([*words, "--rank", "9", "--basis-rank", "8"]) == 2
    assert "the rank is 9: must be from 1 to 8" in capsys.readouterr().err


def test_a_filled_catalog_is_measured_with_its_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "registry", "--registry", f"sqlite:///{tmp_path}/r.db", "--lookups", "50"]
    assert main([*words, "--fill", "2000"]) == 0
    times = json.loads(capsys.readouterr().out.splitlines()[-1])["times"]
    assert {"look-up of a shared one", "publish", "tag"} < times.keys()
    assert main(words) == 0  # once more
    assert main([*words, "--fill", "2000"]) == 2
    assert main(["bench", "registry", "--registry", f"sqlite:///{tmp_path}/empty.db"]) == 2
