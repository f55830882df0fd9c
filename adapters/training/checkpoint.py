"""Checkpoints: everything a run's next step depends on, in one safetensors file.

One file, so that a checkpoint is replaced atomically. What identifies the run (``fingerprint``) and
what is not a tensor (``progress``) travel in the header. No pickle.
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
from shoal.adapters.training.errors import ResumeMismatch, RunDirectoryError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after some step.

    Attributes:
        step: updates made.
        progress: whatever else the trainer knows, as JSON.
        tensors: by name, on the CPU.
    """

    step: int
    progress: Any
    tensors: Mapping[str, Tensor]


def save_checkpoint(path: Path, checkpoint: Checkpoint, fingerprint: Mapping[str, object]) -> None:
    """Write the state; durable when it returns."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()
    }
    header = {
        "step": str(checkpoint.step),
        "progress": json.dumps(checkpoint.progress),
        "fingerprint": json.dumps(fingerprint, sort_keys=True),
    }
    write_atomically(path, [save(tensors, metadata=header)])


def load_checkpoint(path: Path, fingerprint: Mapping[str, object]) -> Checkpoint:
    """Read the state.

    Raises:
        RunDirectoryError: the file is not a checkpoint.
        ResumeMismatch: it belongs to a run with other options, data or base; names the first
            difference.
    """
    checkpoint, saved = _read(path)
    current = json.loads(json.dumps(fingerprint))
    for name in sorted(current.keys() | saved.keys()):
        if current.get(name) != saved.get(name):
            raise ResumeMismatch(
                f"{name} is {current.get(name)}, in {path} it was {saved.get(name)}: "
                "a resumed run must keep it"
            )
    return checkpoint


def _read(path: Path) -> tuple[Checkpoint, dict[str, object]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = json.loads(header["progress"])
        checkpoint = Checkpoint(int(header["step"]), progress, tensors)
        return checkpoint, json.loads(header["fingerprint"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunDirectoryError(f"{path} is not a checkpoint of this trainer: {error}") from error
