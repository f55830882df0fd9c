"""``TASKS``: who is to be trained, one JSON object a line, all checked before anything starts."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.adapters.errors import AdapterError
from shoal.adapters.registry.names import validate_name, validate_owner, validate_tags
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data.records import Problems, RecordRejected
from shoal.adapters.training.data.tasks import PREFIX
from shoal.adapters.training.errors import DataRejected, OptionRejected
from shoal.adapters.training.fleet.config import FleetConfig

# What a tenant may have of its own; everything else is the same for all.
_NUMBERS: dict[str, type] = {"seed": int, "steps": int, "batch_size": int, "lr": float}
_FIELDS = ("name", "data", "owner", "eval_data", "tags", *_NUMBERS)
TENANTS_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class Tenant:
    """One line.

    Attributes:
        line: where it stands, from 1.
        name: of the adapter.
        owner: whose adapter; '' is a registry's without keys.
        config: the plain run that would train it.
        tags: for the registry.
    """

    line: int
    name: str
    owner: str
    config: TrainConfig
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """``owner/name``, or ``name`` without an owner: what it is called in files and reports."""
        return f"{self.owner}/{self.name}" if self.owner else self.name


def read_tenants(config: FleetConfig) -> list[Tenant]:
    """Read and check the whole file; blank lines are skipped.

    Raises:
        DataRejected: it cannot be read, is empty, or lines break a rule: the first ten are named.
    """
    path = config.fleet
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataRejected(path, None, f"cannot be read: {error.strerror}") from error
    problems = Problems(path)
    tenants: list[Tenant] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tenant = _tenant(config, number, line)
            before = taken.setdefault(tenant.reference, number)
            if before != number:
                raise RecordRejected(f"{tenant.reference} is already on line {before}")
            tenants.append(tenant)
        except RecordRejected as rejected:
            problems.add(number, str(rejected))
    owners = {tenant.owner for tenant in tenants}
    for tenant in tenants:
        if not tenant.owner and tenant.name in owners:
            problems.add(tenant.line, f"{tenant.name} is an owner too: their directories collide")
    problems.raise_if_any()
    if not tenants:
        raise DataRejected(path, None, "names no tenants; one JSON object a line is expected")
    if len(tenants) > TENANTS_MAX:
        raise DataRejected(path, None, f"{len(tenants)} tenants, at most {TENANTS_MAX} are trained")
    return tenants


def _tenant(config: FleetConfig, number: int, line: bytes) -> Tenant:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordRejected(f"is not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise RecordRejected("must be a JSON object")
    unknown = [name for name in value if name not in _FIELDS]
    if unknown:
        raise RecordRejected(f"{unknown[0][:100]!r} is none of {', '.join(_FIELDS)}")
    name, owner, tags = _identity(value)
    changes: dict[str, Any] = {
        "out": config.common.out / owner / name,
        "data": _path(config, value, "data"),
    }
    if changes["data"] is None:
        raise RecordRejected('"data" is missing')
    evaluation = _path(config, value, "eval_data")
    if evaluation is not None:
        changes["eval_data"] = evaluation
    if evaluation is not None or config.common.eval_data is not None:
        changes["patience"] = config.patience
    for key, kind in _NUMBERS.items():
        if value.get(key) is not None:
            changes[key] = _number(key, value[key], kind)
    try:
        own = replace(config.common, **changes)
    except OptionRejected as rejected:
        raise RecordRejected(str(rejected)) from rejected
    if own.batch_size > config.rows:
        raise RecordRejected(f"batch_size is {own.batch_size}: a step has {config.rows} rows")
    return Tenant(number, name, owner, own, tags)


def _identity(value: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    name, owner, tags = value.get("name"), value.get("owner") or "", value.get("tags") or {}
    if not isinstance(name, str) or not isinstance(owner, str) or not isinstance(tags, dict):
        raise RecordRejected('"name" and "owner" must be strings, "tags" an object')
    try:
        return validate_name(name), owner and validate_owner(owner), validate_tags(tags)
    except AdapterError as error:
        raise RecordRejected(str(error)) from error


def _path(config: FleetConfig, value: dict[str, Any], key: str) -> Path | None:
    """A path relative to the file, or a task to generate."""
    text = value.get(key)
    if text is None:
        return None
    if not isinstance(text, str) or not text or "\0" in text:
        raise RecordRejected(f'"{key}" must be the path of a file')
    return Path(text) if text.startswith(PREFIX) else config.fleet.parent / text


def _number(key: str, value: object, kind: type) -> int | float:
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        what = "a number" if kind is float else "a whole number"
        raise RecordRejected(f'"{key}" must be {what}')
    assert isinstance(value, int | float)
    return kind(value) if kind is float else value
