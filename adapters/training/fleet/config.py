"""``FleetConfig``: what a fleet is asked for beyond what a plain run is."""

from dataclasses import dataclass
from pathlib import Path

from shoal.adapters.training.config import TrainConfig, option, required
from shoal.adapters.training.errors import OptionRejected

METHODS = ("lora-xs", "miss")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """Who is trained and how many at a time. Raises ``OptionRejected``."""

    # ruff cannot see that option() and required() are dataclasses.field() (RUF009).
    common: TrainConfig
    fleet: Path = required("train many tenants' adapters at once: JSONL, one tenant a line")  # noqa: RUF009
    rows: int = option(64, "with --fleet: records per forward pass, all tenants' together")
    resident: int | None = option(
        None,
        "with --fleet: tenants that take turns at a time; the others wait until one is finished "
        "(default: as many as fit 8 GiB of values and optimiser state)",
    )

    def __post_init__(self) -> None:
        self._require("method", self.common.method in METHODS, f"a fleet trains {METHODS}")
        self._require("accumulate", self.common.accumulate == 1, "a fleet has large steps already")
        size = self.common.batch_size
        self._require("rows", self.rows >= size, f"must be at least the batch-size, {size}")
        held = self.resident
        self._require("resident", held is None or held >= 1, "must be at least 1")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self if hasattr(self, name) else self.common, name)
            raise OptionRejected(name, value, rule)
