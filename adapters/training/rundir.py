"""The run directory: what lies where, and when it may be used.

::

    OUT/adapter_config.json adapter_model.safetensors    the adapter
        training.json        options, environment, digests of data and base; at the end the result
        metrics.jsonl eval.jsonl loss.png                what happened
        checkpoint/state.safetensors                     what --resume needs

Lanes that have names have such a directory each, ``OUT/NAME``; the checkpoint is one for all.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
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
        check_place(self.path, self.checkpoint, "run", resume=resume, overwrite=overwrite)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that a run writes."""
        return (
            self.checkpoint,
            self.options,
            self.metrics,
            self.evals,
            self.plot,
            *self.adapter,
        )

    def clear(self) -> None:
        """Make the directory, and remove the files named above from it; others stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.files:
            path.unlink(missing_ok=True)
        self.sweep()

    def drop_adapter(self) -> None:
        """Remove the adapter of an earlier part of the run."""
        for path in self.adapter:
            path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        sweep(self.files)


def check_place(path: Path, checkpoint: Path, what: str, *, resume: bool, overwrite: bool) -> None:
    """Say whether a run (or ``what`` it is) may use a directory; changes nothing.

    Raises:
        RunDirectoryError: it is a file, or cannot be written; it is not empty and neither option
            was given; or there is no checkpoint to resume.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"out {path} is a file: must be a directory")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunDirectoryError(f"out {path} cannot be written: {there} allows no new files")
    if resume:
        if not checkpoint.is_file():
            its = "" if what == "run" else f"{what}'s "
            raise RunDirectoryError(
                f"{path} has no {its}checkpoint to resume: leave --resume out"
                + ("" if not any_in(path) else ", and give --overwrite to replace what is there")
            )
    elif not overwrite and any_in(path):
        raise RunDirectoryError(
            f"out {path} is not empty: must be new or empty; "
            f"give --resume to go on, or --overwrite to replace the {what} in it"
        )


def any_in(path: Path) -> bool:
    """Whether it is a directory with anything in it."""
    return path.is_dir() and any(path.iterdir())


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Make the directory, and keep other processes of the trainer out of it.

    The claim is the kernel's and ends with the process, however that ends. Where a file system
    knows no locks there is none.

    Raises:
        RunDirectoryError: another process has it.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryError(f"out {path} is in use by another process") from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def sweep(files: Iterable[Path]) -> None:
    """Remove what a killed process left half written beside files that are replaced atomically.

    Those have names of ``tempfile``; what others, such as an editor, have there stays.
    """
    for file in files:
        for path in file.parent.glob(f".{file.name}.????????"):
            path.unlink(missing_ok=True)
