"""What a measured run's JSON line says of its conditions, and where it is kept."""

import json
import platform
import subprocess
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.loadtests.driver import Case

if TYPE_CHECKING:
    from shoal.server.offline import OfflineEngine

BASE, ADAPTERS = "base", "adapters"


@dataclass(frozen=True, slots=True)
class Record:
    """Conditions that all runs of one process share, and the file that takes their lines.

    Attributes:
        shared: as JSON; ``run_id`` ties the lines of one process together.
        bank: what only runs with adapters say: family, rank, how many are resident.
        path: appended to; None keeps nothing.
    """

    shared: dict[str, Any]
    bank: dict[str, Any]
    path: Path | None

    @classmethod
    def begin(
        cls, engine: "OfflineEngine", path: Path | None, rounds: int, commit: str | None
    ) -> "Record":
        """A new process's; ``commit`` is what git says unless it is given."""
        config = engine.config
        shared = {
            "run_id": uuid.uuid4().hex[:12],
            "model_shape": config.model_shape,
            "basis_rank": config.basis_rank,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "seed": config.seed,
            "rounds": rounds,
            "commit": commit or _commit(),
            "gpu": engine.device_name(),
            "torch": _version("torch"),
            "triton": _version("triton"),
            "python": platform.python_version(),
        }
        bank = {"family": config.family, "rank": config.rank, "resident": len(engine.adapters)}
        return cls(shared, bank, path)

    def line(self, case: Case, adapters: int, **figures: Any) -> dict[str, Any]:
        """One run as JSON; the base's lines say that it has no adapters."""
        if adapters:
            side = {"side": ADAPTERS, "adapters": adapters, **self.bank}
        else:
            side = {"side": BASE, "adapters": 0, "family": None, "rank": 0, "resident": 0}
        return {**self.shared, **case._asdict(), **side, **figures}

    def append(self, line: dict[str, Any]) -> None:
        """Keep a line, if there is a file."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _commit() -> str:
    """The commit of this checkout, ``-dirty`` with local changes; ``unknown`` outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
