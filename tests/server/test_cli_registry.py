"""``shoal adapters export|import`` and ``shoal doctor`` on a registry URL."""

import hashlib
from pathlib import Path

import pytest

from shoal.adapters.registry.catalog import Content
from shoal.adapters.registry.registry import Registry
from shoal.server.__main__ import main

BASE = "b" * 64


def fill(folder: Path, count: int = 3) -> str:
    url = f"sqlite:///{folder}/registry.db"
    registry = Registry.open(url, base_digest=BASE)
    for n in range(count):
        data = b"%d" % n
        digest = hashlib.sha256(data).hexdigest()
        content = Content(digest, "lora", "lora", 8, len(data), 1024, None)
        registry.publish(f"a{n}", content, data)
    registry.close()
    return url


def test_what_is_exported_is_imported_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = str(tmp_path / "all.tar")
    assert main(["adapters", "export", tar, "--registry", fill(tmp_path)]) == 0
    other = f"sqlite:///{tmp_path}/other.db"
    for said in ("3 new names", "3 were there already"):
        assert main(["adapters", "import", tar, "--registry", other]) == 0
        assert said in capsys.readouterr().err
    registry = Registry.open(other, base_digest=BASE)
    assert [registry.read(info.digest) for info in registry.page(limit=9)[0]] == [b"0", b"1", b"2"]
    registry.close()
    assert main(["doctor", "--registry", other]) == 0
    assert main(["adapters", "export", tar, "--registry", other]) == 1  # never over a file
    assert main(["adapters", "import", str(tmp_path / "none"), "--registry", other]) == 1
    assert "error: " in capsys.readouterr().err


def test_the_doctor_says_what_is_wrong_and_repairs_what_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = fill(tmp_path)
    store = tmp_path / "registry.db.store"
    [*_, last] = sorted(path for path in (store / "records").rglob("*") if path.is_file())
    orphan = store / "records" / "00" / "00" / ("0" * 64)
    orphan.parent.mkdir(parents=True, exist_ok=True)
    last.rename(orphan)
    command = ["doctor", "--registry", url, "--grace-hours", "0"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert (
        f"1 missing  (upload the same content again, or import it with --mend)\n  {last.name}\n"
        in said
    )
    assert f"1 orphans  (--repair removes them)\n  {'0' * 64}\n" in said
    assert main([*command, "--repair"]) == 1
    assert "removed 1 records" in capsys.readouterr().out
    assert not orphan.exists()
    assert main(["doctor", "--registry", "nosuch://"]) == 1
    assert main(["doctor", "--grace-hours", "-1"]) == 2


def test_what_the_doctor_misses_is_mended_by_importing_a_backup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, tar = fill(tmp_path), str(tmp_path / "all.tar")
    assert main(["adapters", "export", tar, "--registry", url]) == 0
    records = tmp_path / "registry.db.store" / "records"
    one, other, _ = sorted(path for path in records.rglob("*") if path.is_file())
    one.unlink()
    other.write_bytes(b"rust")
    assert main(["doctor", "--registry", url]) == 1
    assert main(["adapters", "import", tar, "--registry", url, "--mend"]) == 0
    assert "mended 2 records" in capsys.readouterr().err
    assert main(["doctor", "--registry", url]) == 0


@pytest.mark.parametrize(
    "verb",
    [
        ["doctor"],
        ["adapters", "export", "-"],
        ["keys", "list"],
        ["keys", "revoke", "0" * 16],
        ["keys", "change", "0" * 16, "--weight", "2"],
    ],
)
def test_a_mistyped_registry_is_not_one_in_which_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    assert main([*verb, "--registry", f"sqlite:///{tmp_path}/none.db"]) == 1
    assert "no registry at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
