"""A fleet on the tiny base: tenants with different data, and what each would get alone."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet.config import FleetConfig
from shoal.adapters.training.fleet.loop import FleetStepMetrics
from shoal.adapters.training.fleet.trainer import FleetResult, train_fleet
from shoal.adapters.training.trainer import train


@dataclass(frozen=True)
class FleetLab:
    """Trains fleets and single tenants on the tiny base."""

    base: Path
    root: Path

    def tasks(self, *tenants: dict[str, Any], name: str = "tasks.jsonl") -> Path:
        """A file of tenants; each has data of its own unless it names some."""
        for number, tenant in enumerate(tenants):
            if "data" not in tenant and "name" in tenant:
                tenant["data"] = self.data(tenant["name"], number).name
        path = self.root / name
        path.write_text("".join(json.dumps(tenant) + "\n" for tenant in tenants))
        return path

    def data(self, name: str, number: int) -> Path:
        """A file of ``number + 2`` records of different lengths."""
        path = self.root / f"{name}.jsonl"
        lines = [
            {"prompt": f"{name} {i} ", "completion": "xyz"[: 1 + (i + number) % 3] * (number + 1)}
            for i in range(number + 2)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def common(self, out: str, **options: Any) -> TrainConfig:
        """Options of all tenants."""
        asked: dict[str, Any] = {"method": "lora-xs", "steps": 6, "rank": 4, "batch_size": 2}
        paths = {"base": self.base, "data": self.root, "out": self.root / out}
        return TrainConfig(**{**paths, **asked, "device": "cpu", **options})

    def fleet(
        self,
        tasks: Path,
        out: str = "out",
        *,
        rows: int = 16,
        resident: int | None = None,
        patience: int | None = None,
        on_step: Callable[[FleetStepMetrics], None] | None = None,
        publisher: Any = None,
        **options: Any,
    ) -> FleetResult:
        """Train a fleet."""
        config = FleetConfig(
            common=self.common(out, **options),
            fleet=tasks,
            rows=rows,
            resident=resident,
            patience=patience,
        )
        return train_fleet(
            config,
            cache_dir=self.root / "bases",
            progress=False,
            on_step=on_step,
            publisher=publisher,
        )

    def alone(self, out: str, **options: Any) -> None:
        """Train one adapter the plain way."""
        train(self.common(out, **options), cache_dir=self.root / "bases", progress=False)


@pytest.fixture
def fleet_lab(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FleetLab:
    """Trains on the tiny base; leaves the user's cache alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))
    return FleetLab(base, tmp_path)
