"""What is compared: a method, its options, and the learning rates it is tried with. No torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Learning rates tried on one task, by method. Where the best is an end of its row, the sweep goes
# on beyond it (`choosing.sweep_left`), so a row need only be near, and few rates do.
GRIDS: Mapping[str, tuple[float, ...]] = {
    "lora": (5e-4, 1e-3, 2e-3, 5e-3),
    "rslora": (5e-4, 1e-3, 2e-3, 5e-3),
    "lora-plus": (1e-4, 2e-4, 5e-4, 1e-3),
    "dora": (5e-4, 1e-3, 2e-3, 5e-3),
    "pissa": (2e-4, 5e-4, 1e-3, 2e-3),
    "milora": (5e-4, 1e-3, 2e-3, 5e-3),
    # Large ranks with Σ want the small ones, random factors and those without Σ the large ones.
    "lora-xs": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "miss": (5e-4, 1e-3, 2e-3, 5e-3),
    "adalora": (5e-3, 1e-2, 2e-2, 5e-2),
    "vera": (1e-2, 3e-2, 1e-1, 3e-1),
    "svf": (1e-2, 3e-2, 1e-1, 3e-1),
    "svft": (5e-3, 1e-2, 2e-2, 5e-2),
}
# Rates tried beyond the ends of a row, at most.
BEYOND = 2
# What every run shares unless a setting says otherwise.
STEPS = 300
BATCH = 16
MAX_LENGTH = 256
SEEDS = (1, 2, 3)
SWEEP_SEED = 0
SWEEP_TASK = "words"
SHARED: Mapping[str, Any] = {
    "batch_size": BATCH,
    "max_length": MAX_LENGTH,
    "schedule": "linear",
    "warmup": 0.1,
}


@dataclass(frozen=True)
class Setting:
    """A method with options.

    Attributes:
        label: what tables call it.
        method: as ``--method`` takes it.
        options: further fields of ``TrainConfig``.
        lr: None: swept over the method's grid; otherwise fixed, as the paper has it.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """All options, the shared ones included."""
        return {**SHARED, **self.options}

    @property
    def records(self) -> int:
        """Records of one update."""
        return int(self.asked["batch_size"]) * int(self.asked.get("accumulate", 1))

    @property
    def grid(self) -> tuple[float, ...]:
        """Learning rates to try first."""
        return GRIDS[self.method] if self.lr is None else (self.lr,)

    @property
    def id(self) -> str:
        """The same for the same method and options, whatever the table calls them."""
        text = json.dumps([self.method, self.asked], sort_keys=True, default=list)
        return f"{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Group:
    """Runs side by side as lanes: one setting on one task, lanes that differ in seed or rate.

    Attributes:
        lanes: (seed, learning rate) of each.
    """

    setting: Setting
    task: str
    lanes: tuple[tuple[int, float], ...]
    steps: int = STEPS

    @property
    def runs(self) -> tuple[str, ...]:
        """The id of each lane's run, which its record in the log carries."""
        return tuple(
            run_id(self.setting, self.task, lr, seed, self.steps) for seed, lr in self.lanes
        )

    @property
    def id(self) -> str:
        """Of the directory."""
        seeds = "-".join(str(seed) for seed in sorted({seed for seed, _ in self.lanes}))
        rates = len({lr for _, lr in self.lanes})
        name = "sweep" if rates > 1 else f"lr{self.lanes[0][1]:g}"
        return f"{self.setting.id}-{self.task}-{self.steps}-{name}-s{seeds}"


def run_id(setting: Setting, task: str, lr: float, seed: int, steps: int = STEPS) -> str:
    """Identifies a run by everything that decides its result, the machine aside."""
    rate = f"{lr:g}".replace("+", "")  # it names a directory
    return f"{setting.id}-{task}-{steps}-lr{rate}-s{seed}"


def sweep_of(setting: Setting, steps: int = STEPS, rates: tuple[float, ...] | None = None) -> Group:
    """The runs that choose a setting's learning rate; their seed is used for nothing else.

    Args:
        setting: whose.
        steps: updates of each run.
        rates: None: the setting's grid.
    """
    lanes = tuple((SWEEP_SEED, lr) for lr in rates or setting.grid)
    return Group(setting, SWEEP_TASK, lanes, steps)
