"""What identifies a base: its bytes, whatever is cached."""

import os
from pathlib import Path

import pytest

from shoal.adapters.base import base_digest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model-1.safetensors").write_bytes(b"one")
    (path / "model-2.safetensors").write_bytes(b"two")
    return path


def test_gguf_digest_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert base_digest(file) == expected


def test_directory_digest_covers_config_and_weights_only(tmp_path: Path) -> None:
    one, two = model(tmp_path / "a"), model(tmp_path / "b")
    (two / "README.md").write_text("other")
    assert base_digest(one) == base_digest(two)
    for name in ("config.json", "model-2.safetensors"):
        before = (two / name).read_bytes()
        (two / name).write_bytes(before + b" ")
        assert base_digest(one) != base_digest(two)
        (two / name).write_bytes(before)
    (two / "model-2.safetensors").rename(two / "model-3.safetensors")
    assert base_digest(one) != base_digest(two)


def test_cache_answers_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"abc")
    os.utime(file, ns=(1, 1))
    first = base_digest(file)
    file.write_bytes(b"xyz")
    os.utime(file, ns=(1, 1))
    assert base_digest(file) == first  # same size and time: not read again
    os.utime(file, ns=(2, 2))
    assert base_digest(file) != first


def test_damaged_cache_is_ignored(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"abc")
    first = base_digest(file)
    (entry,) = cache.rglob("*.json")
    for damaged in (b"", b"[]", b'{"stamp": 1}', b"\xff"):
        entry.write_bytes(damaged)
        assert base_digest(file) == first


def test_directory_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        base_digest(tmp_path)
