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
from shoal.adapters.training.rundir import check_place, sweep


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
        check_place(self.path, self.checkpoint, "fleet", resume=resume, overwrite=overwrite)

    @property
    def files(self) -> tuple[Path, ...]:
        """All of the fleet's own; its tenants have theirs."""
        return self.checkpoint, self.options, self.steps, self.results

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        sweep(self.files)

    def clear(self) -> None:
        """Make the directory, and remove the files named above from it; others stay."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        for path in self.files:
            path.unlink(missing_ok=True)
        self.sweep()

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
