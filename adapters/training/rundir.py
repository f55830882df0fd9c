"""The run directory: what lies where, and when it may be used.

::

    OUT/adapter_config.json adapter_model.safetensors    the adapter
        training.json        options, environment, digests of data and base; at the end the result
        metrics.jsonl eval.jsonl loss.png                what happened
        checkpoint/state.safetensors                     what --resume needs

Lanes that have names have such a directory each, ``OUT/NAME``; the checkpoint is one for all.
"""

from dataclasses import dataclass
from pathlib import Path

from shoal.adapters.training.errors import RunDirectoryError


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Names the files of a run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Everything ``--resume`` needs, in one file."""
        return self.path / "checkpoint" / "state.safetensors"

    @property
    def options(self) -> Path:
        """Options, environment, digests and result, for people."""
        return self.path / "training.json"

    @property
    def metrics(self) -> Path:
        """One line per optimiser step."""
        return self.path / "metrics.jsonl"

    @property
    def evals(self) -> Path:
        """One line per evaluation."""
        return self.path / "eval.jsonl"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def adapter(self) -> tuple[Path, Path]:
        """The adapter's config and tensors."""
        return self.path / "adapter_config.json", self.path / "adapter_model.safetensors"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Say whether a run may use the directory; changes nothing.

        Raises:
            RunDirectoryError: it is a file; it is not empty and neither option was given; or
                there is no checkpoint to resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"out {self.path} is a file: must be a directory")
        if resume:
            if not self.checkpoint.is_file():
                raise RunDirectoryError(f"{self.path} has no checkpoint to resume")
        elif not overwrite and self.path.is_dir() and any(self.path.iterdir()):
            raise RunDirectoryError(
                f"out {self.path} is not empty: must be new or empty; "
                "give --resume to go on, or --overwrite to replace the run in it"
            )

    def clear(self) -> None:
        """Make the directory, and remove the files named above from it; others stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        mine = (self.checkpoint, self.options, self.metrics, self.evals, self.plot, *self.adapter)
        for path in mine:
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process left half written beside the checkpoint."""
        for path in self.checkpoint.parent.glob(f".{self.checkpoint.name}.*"):
            path.unlink(missing_ok=True)
