"""``shoal train --fleet TASKS``: many tenants' adapters at once, streamed into a registry."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.fleet.config import FleetConfig

if TYPE_CHECKING:
    from shoal.adapters.training.fleet.publishing import RegistryPublisher
    from shoal.adapters.training.fleet.trainer import FleetResult
    from shoal.adapters.training.methods.source import Source

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``FleetConfig`` that has a help; absent unless given."""
    group = parser.add_argument_group("many tenants at once")
    for spec in fields(FleetConfig):
        if "help" not in spec.metadata:
            continue
        kind = spec.type if spec.name == "fleet" else int
        group.add_argument(
            f"--{spec.name}",
            type=kind,
            default=argparse.SUPPRESS,
            metavar="TASKS" if spec.name == "fleet" else None,
            help=spec.metadata["help"],
        )
    for name, help in (
        ("registry", "with --fleet: publish each adapter there as soon as it is finished"),
        ("store", "with --registry: as for serve"),
    ):
        group.add_argument(f"--{name}", metavar="URL", default=argparse.SUPPRESS, help=help)


def check(args: argparse.Namespace) -> None:
    """OptionRejected when what is there without, or beside, ``--fleet`` makes no sense."""
    from shoal.adapters.training.errors import OptionRejected

    if hasattr(args, "fleet"):
        if args.data is not None:
            raise OptionRejected("data", args.data, "excludes fleet: every tenant names its own")
        return
    if args.data is None:
        raise OptionRejected("data", None, "must be given, or fleet")
    for name in ("rows", "resident", "registry", "store"):
        if hasattr(args, name):
            raise OptionRejected(name, getattr(args, name), "needs fleet")


def run(args: argparse.Namespace) -> int:
    """Train as asked.

    Returns:
        0 when all is well, 1 when not for every tenant, 130 when interrupted, 2 when the registry
        cannot be opened.

    Raises:
        TrainingError, AdapterError, ModelError: as a plain run.
    """
    from shoal.adapters.registry.errors import RegistryError

    try:
        return _train(args)
    except RegistryError as error:
        print(f"shoal train: {error}", file=sys.stderr)
        return 2


def _train(args: argparse.Namespace) -> int:
    from platformdirs import user_cache_path

    from shoal.adapters.training.fleet.trainer import train_fleet
    from shoal.server.model.pull import resolve_model

    config = _config(args, args.base)  # refuses bad options before anything is downloaded
    config = _config(args, resolve_model(str(config.common.base)))
    with _publishing(args) as publisher:
        result = train_fleet(
            config, cache_dir=user_cache_path("shoal") / "bases", publisher=publisher
        )
    return _report(config, result, published=publisher is not None)


def _config(args: argparse.Namespace, base: Any) -> FleetConfig:
    values = {spec.name: getattr(args, spec.name) for spec in fields(TrainConfig)}
    own = {name: getattr(args, name) for name in ("rows", "resident") if hasattr(args, name)}
    # Who has no data to measure on is not stopped early: tenant by tenant.
    values |= {"base": base, "data": args.fleet, "patience": None}
    common = TrainConfig(**values)
    return FleetConfig(common=common, fleet=args.fleet, patience=args.patience, **own)


@contextmanager
def _publishing(args: argparse.Namespace) -> Iterator[Any]:
    """What opens the registry, if there is to be one; it is closed at the end."""
    from shoal.adapters.training.errors import OptionRejected

    url, store = getattr(args, "registry", None), getattr(args, "store", None)
    if url is None:
        if store is not None:
            raise OptionRejected("store", store, "needs a registry")
        yield None
        return
    opened: list[RegistryPublisher] = []

    def publisher(source: "Source") -> "RegistryPublisher":
        from shoal.adapters.training.fleet.publishing import RegistryPublisher
        from shoal.server.config import ServeConfig

        limits = ServeConfig(model=str(args.base))
        opened.append(
            RegistryPublisher(
                source,
                url,
                store,
                reserved_names=frozenset({limits.base_name.lower()}),
                max_upload_bytes=limits.max_upload_bytes,
            )
        )
        return opened[-1]

    try:
        yield publisher
    finally:
        for one in opened:
            one.close()


def _report(config: FleetConfig, result: "FleetResult", *, published: bool) -> int:
    out = config.common.out
    if not result.finished:
        print(
            f"shoal train: interrupted after step {result.steps}, {len(result.tenants)} tenants "
            f"finished; the checkpoint is in {out}, --resume goes on from it",
            file=sys.stderr,
        )
        return INTERRUPTED
    diverged = [end for end in result.tenants if end.fate == "diverged"]
    refused = [end for end in result.tenants if end.problem is not None]
    for end in diverged:
        print(f"shoal train: {end.reference} diverged after {end.steps} steps", file=sys.stderr)
    for end in refused:
        print(f"shoal train: {end.reference} is not published: {end.problem}", file=sys.stderr)
    made = len(result.tenants) - len(diverged)
    where = f", {made - len(refused)} published" if published else ""
    print(
        f"{out}: {made} {config.common.method} adapters of {result.parameters} values "
        f"in {result.steps} steps{where}"
    )
    return 1 if diverged or refused else 0
