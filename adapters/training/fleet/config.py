"""``FleetConfig``: what a fleet is asked for beyond what a plain run is."""

from dataclasses import dataclass
from pathlib import Path

from shoal.adapters.training.config import TrainConfig, option, required
from shoal.adapters.training.errors import OptionRejected

METHODS = ("lora-xs", "miss")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """Who is trained and how many at a time. Raises ``OptionRejected``.

    Attributes:
        common: what all tenants have in common, as of a plain run. Its data is not read; its
            directory is the fleet's.
        patience: as of a plain run; for the tenants that have data to measure on.
    """

    common: TrainConfig
    patience: int | None = None
    # ruff cannot see that option() and required() are dataclasses.field() (RUF009).
    fleet: Path = required("train many tenants' adapters at once: JSONL, one tenant a line")  # noqa: RUF009
    rows: int = option(64, "with --fleet: records per forward pass, all tenants' together")
    resident: int | None = option(
        None,
        "with --fleet: tenants that take turns at a time; the others wait until one is finished "
        "(default: as many as fit 8 GiB of values and optimiser state)",
    )

    def __post_init__(self) -> None:
        common = self.common
        names = ", ".join(METHODS)
        _require("method", common.method, common.method in METHODS, f"a fleet trains {names}")
        for name, value in (("accumulate", common.accumulate > 1), ("pack", common.pack)):
            _require(name, getattr(common, name), not value, "is not for fleets")
        _require("seeds", common.seeds, not common.seeds, "is not for fleets: a tenant has a seed")
        size = common.batch_size
        _require("rows", self.rows, self.rows >= size, f"must be at least batch-size, {size}")
        for name in ("resident", "patience"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 1, "must be at least 1")


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise OptionRejected(name, value, rule)
