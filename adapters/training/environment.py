"""Where a run happens: versions, device, commit, command line; what its figures depend on."""

import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from shoal import __version__

_ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, object]:
    """The environment as JSON can say it; ``commit`` is None outside a checkout of this project."""
    on_cuda = device.type == "cuda"
    return {
        "shoal": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: what torch has allocated on a GPU; else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _commit() -> str | None:
    """The checkout's commit, with a + when files differ from it."""
    if not (_ROOT / ".git").exists():
        return None
    commit = _git("rev-parse", "HEAD")
    return f"{commit}+" if commit and _git("status", "--porcelain", "-uno") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
