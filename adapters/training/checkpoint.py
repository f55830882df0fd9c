"""Checkpoints: trained values, optimiser state and the step, in one safetensors file.

One file, so that a checkpoint is replaced atomically. What identifies the run (``fingerprint``)
travels in the header, so that a checkpoint cannot be resumed into another run. No pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.errors import ResumeMismatch, RunDirectoryError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    path: Path,
    *,
    step: int,
    fingerprint: Mapping[str, object],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    state: Mapping[str, Tensor],
) -> None:
    """Write the state after ``step`` updates; durable when it returns."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value.{name}"] = parameter.detach().cpu().contiguous()
        known = optimizer.state.get(parameter, {})
        for moment in _MOMENTS:
            if moment in known:
                tensors[f"{moment}.{name}"] = known[moment].detach().cpu().contiguous()
    for name, tensor in state.items():
        tensors[f"method.{name}"] = tensor.detach().cpu().contiguous()
    header = {"step": str(step), "fingerprint": json.dumps(fingerprint, sort_keys=True)}
    write_atomically(path, [save(tensors, metadata=header)])


def load_checkpoint(
    path: Path,
    *,
    fingerprint: Mapping[str, object],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    state: Mapping[str, Tensor],
) -> int:
    """Restore the state into ``parameters``, ``optimizer`` and ``state``.

    Returns:
        How many updates the state contains.

    Raises:
        RunDirectoryError: the file is not a checkpoint.
        ResumeMismatch: it belongs to a run with other options, data or base; names the first
            difference.
    """
    step, saved, tensors = _read(path)
    current = json.loads(json.dumps(fingerprint))
    for name in sorted(current.keys() | saved.keys()):
        if current.get(name) != saved.get(name):
            raise ResumeMismatch(
                f"{name} is {current.get(name)}, in {path} it was {saved.get(name)}: "
                "a resumed run must keep it"
            )
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"value.{name}"])
        moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
        if moments:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in moments.items()
            }
    for name, tensor in state.items():
        tensor.copy_(tensors[f"method.{name}"])
    return step


def _read(path: Path) -> tuple[int, dict[str, object], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return int(header["step"]), json.loads(header["fingerprint"]), tensors
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunDirectoryError(f"{path} is not a checkpoint of this trainer: {error}") from error
