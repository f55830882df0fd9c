"""A fleet's directory: what lies where, and its checkpoint.

::

    OUT/NAME/ or OUT/OWNER/NAME/      of each tenant: the adapter, metrics.jsonl, eval.jsonl
        _fleet/training.json          the options, and digests of base and data
        _fleet/steps.jsonl            what happened, one line a step
        _fleet/results.jsonl          who is finished and how, one line a tenant
        _fleet/state.safetensors      what --resume needs
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.errors import RunDirectoryError


@dataclass(frozen=True, slots=True)
class FleetDirectory:
    """Names the files of a fleet. No adapter's name begins with the ``_`` of its own folder."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """Everything ``--resume`` needs, in one file."""
        return self.path / "_fleet" / "state.safetensors"

    @property
    def options(self) -> Path:
        """The options and digests, for people."""
        return self.path / "_fleet" / "training.json"

    @property
    def steps(self) -> Path:
        """One line a step."""
        return self.path / "_fleet" / "steps.jsonl"

    @property
    def results(self) -> Path:
        """One line a finished tenant."""
        return self.path / "_fleet" / "results.jsonl"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Say whether a fleet may use the directory; changes nothing.

        Raises:
            RunDirectoryError: it is a file; it is not empty and neither option was given; or
                there is no checkpoint to resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"out {self.path} is a file: must be a directory")
        if resume:
            if not self.checkpoint.is_file():
                raise RunDirectoryError(f"{self.path} has no fleet's checkpoint to resume")
        elif not overwrite and self.path.is_dir() and any(self.path.iterdir()):
            raise RunDirectoryError(
                f"out {self.path} is not empty: must be new or empty; "
                "give --resume to go on, or --overwrite to replace the fleet in it"
            )

    def clear(self) -> None:
        """Make the directory, and remove the files named above from it; others stay."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.checkpoint, self.options, self.steps, self.results):
            path.unlink(missing_ok=True)

    def save(self, state: Mapping[str, Tensor], head: Mapping[str, Any]) -> None:
        """Replace the checkpoint; durable when it returns."""
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        write_atomically(self.checkpoint, [save(tensors, metadata={"fleet": json.dumps(head)})])

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``save`` was given.

        Raises:
            RunDirectoryError: the file is not a checkpoint.
        """
        path = self.checkpoint
        try:
            with safe_open(path, framework="pt") as file:
                head = json.loads((file.metadata() or {})["fleet"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise RunDirectoryError(f"{path} is not a fleet's checkpoint: {error}") from error
        return tensors, head
