"""What is known of an adapter besides its scores: size, and what training it took.

Read from the adapter's directory, as far as it is a run directory of the trainer. What is not
there is not known, and a report leaves it out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.adapters.formats.config_fields import CONFIG_FILE
from shoal.adapters.reading import WEIGHTS_FILE, adapter_files

# Tensors that a file holds besides what was trained.
_FROZEN = ("basis_probe", "svd_probe", "vera_A", "vera_B", "svft_rows", "svft_cols", "svft_s_pre")
_XS = "lora_latent_mapping"
_LENGTH_BYTES = 8  # of a safetensors header


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """One adapter.

    Attributes:
        method: as the trainer names it, else the config's ``peft_type`` in small letters.
        rank: None where there is none.
        parameters: trained values; None where only the served record is known.
        file_bytes: of the adapter's two files.
        train_seconds: of all steps of the run.
        step_seconds: of the median step.
        peak_bytes: most memory of the run: allocated on the GPU, or resident of the process.
        lanes: adapters trained side by side in the run, which share its seconds and memory.
    """

    method: str
    rank: int | None
    parameters: int | None
    file_bytes: int
    train_seconds: float | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None
    lanes: int = 1


def adapter_facts(directory: Path) -> AdapterFacts:
    """Look at an adapter directory.

    Raises:
        AdapterRejected: it is none.
        OSError, ValueError: a file cannot be read.
    """
    files = adapter_files(directory)
    config = json.loads(files[CONFIG_FILE].read_bytes())
    folder = files[CONFIG_FILE].parent
    record = _json(folder / "training.json")
    asked = record.get("asked") or {}
    seconds = _step_seconds(folder / "metrics.jsonl")
    peft_type = str(config.get("peft_type", "")).lower().replace("_", "-")
    # The one asked for: a file on a residual base may hold twice as much. SVF has none.
    ranked = "r" in config or "init_r" in config
    rank = asked.get("rank", config.get("r")) if ranked else None
    parameters = record.get("parameters")
    result = record.get("result") or {}
    lanes = (record.get("run") or {}).get("lanes") or [None]
    return AdapterFacts(
        method=str(asked.get("method") or peft_type),
        rank=rank if isinstance(rank, int) else None,
        parameters=parameters if isinstance(parameters, int) else _trained(files[WEIGHTS_FILE]),
        file_bytes=sum(path.stat().st_size for path in files.values()),
        train_seconds=result.get("seconds", sum(seconds) if seconds else None),
        step_seconds=sorted(seconds)[len(seconds) // 2] if seconds else None,
        peak_bytes=result.get("peak_bytes"),
        lanes=len(lanes),
    )


def unique_names(directories: list[Path], reserved: str) -> list[str]:
    """The shortest ends of the paths that tell them apart, none of them ``reserved``.

    Raises:
        ValueError: the same directory is given twice.
    """
    paths = [path.resolve() for path in directories]
    parts = [path.parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and reserved not in names:
            return names
    twice = next(path for path in paths if paths.count(path) > 1)
    raise ValueError(f"the directory {twice} is given twice")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:  # damaged: what would be told of the training is not known
        return {}
    return value if isinstance(value, dict) else {}


def _step_seconds(path: Path) -> list[float]:
    """Seconds of each step, or nothing where they were not noted."""
    if not path.is_file():
        return []
    try:
        complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
        lines = [json.loads(line) for line in complete.splitlines()]
        return [float(line["seconds"]) for line in lines if line.get("seconds") is not None]
    except (ValueError, AttributeError, TypeError):  # not what the trainer writes
        return []


def _trained(path: Path) -> int:
    """Values in a safetensors file, without those known to be frozen."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(size))
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    official_xs = any(_XS in name for name in shapes)
    total = 0
    for name, shape in shapes.items():
        frozen = any(part in name for part in _FROZEN)
        if official_xs and ("lora_A" in name or "lora_B" in name) and _XS not in name:
            frozen = True
        if not frozen:
            count = 1
            for length in shape:
                count *= length
            total += count
    return total
