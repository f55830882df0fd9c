"""Where results were measured: commit, GPU and versions, for every line of the log."""

import subprocess
from functools import cache
from pathlib import Path

import torch

_told = ""


def place() -> dict[str, str]:
    """``commit`` (with ``+`` when files differ from it), ``gpu`` (or ``cpu``) and ``torch``."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"commit": _told or _commit(), "gpu": gpu, "torch": torch.__version__}


def tell_commit(commit: str) -> None:
    """Say which commit this is, where there is a copy of the files without its history."""
    global _told
    _told = commit


@cache
def _commit() -> str:
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
