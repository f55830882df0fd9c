"""Where bodies lie while they are received."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shoal.server.http import spool
from shoal.server.http.spool import LOCK, PREFIX, Spool, remove_abandoned

HOLD = """
import sys, pathlib
from shoal.server.http.spool import Spool
held = Spool(pathlib.Path(sys.argv[1]))
(held.new_folder() / "part-0").write_bytes(b"x" * 1000)
print("ready", flush=True)
sys.stdin.read()
if sys.argv[2] == "close":
    held.close()
"""


def holder(parent: Path, ending: str = "") -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent), ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def folders(parent: Path) -> list[Path]:
    return sorted(parent.glob(f"{PREFIX}*"))


def test_what_a_killed_process_left_is_removed_and_what_others_hold_is_not(tmp_path: Path) -> None:
    killed, lives = holder(tmp_path), holder(tmp_path)
    mine = Spool(tmp_path)
    (mine.new_folder() / "part-0").write_bytes(b"mine")
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(list(tmp_path.glob("*/*/part-0"))) == 3
    assert remove_abandoned(tmp_path) == 1
    assert len(list(tmp_path.glob("*/*/part-0"))) == 2
    lives.communicate("")
    mine.close()
    Spool(tmp_path).new_folder()
    assert len(folders(tmp_path)) == 1, "who makes one removes the others"


def test_a_process_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    holder(tmp_path, "close").communicate("")
    assert folders(tmp_path) == []


def test_only_abandoned_folders_of_ours_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).write_bytes(b"1")
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}file").write_bytes(b"")
    linked = tmp_path / f"{PREFIX}linked"
    linked.mkdir()
    (linked / LOCK).symlink_to(elsewhere / LOCK)
    lost_its_lock = tmp_path / f"{PREFIX}used"
    (lost_its_lock / "upload-1").mkdir(parents=True)
    being_made = [tmp_path / f"{PREFIX}{name}" for name in ("bare", "unlocked")]
    for folder in being_made:
        folder.mkdir()
    (being_made[1] / LOCK).write_bytes(b"")
    before = folders(tmp_path)
    assert remove_abandoned(tmp_path) == 0
    assert folders(tmp_path) == before
    monkeypatch.setattr(spool, "MAKING_S", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert remove_abandoned(tmp_path) == 0, "another user's"
    assert remove_abandoned(tmp_path) == 2, "they were being made for long"
    assert set(before) - set(folders(tmp_path)) == set(being_made)
    assert (elsewhere / LOCK).exists()


def test_it_is_made_anew_when_somebody_tidied_up(tmp_path: Path) -> None:
    mine = Spool(tmp_path)
    first = mine.new_folder()
    mine.close()
    second = mine.new_folder()
    assert second.is_dir()
    assert second.parent != first.parent
    (second.parent / LOCK).unlink()
    second.rmdir()
    second.parent.rmdir()
    assert mine.new_folder().is_dir()


def test_a_folder_that_cannot_be_locked_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("planted")

    mine = Spool(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        with pytest.raises(OSError, match="planted"):
            mine.new_folder()
    assert folders(tmp_path) == []
    assert mine.new_folder().is_dir()


def test_threads_share_one(tmp_path: Path) -> None:
    mine, made = Spool(tmp_path), []
    threads = [threading.Thread(target=lambda: made.append(mine.new_folder())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
    assert len(folders(tmp_path)) == 1
