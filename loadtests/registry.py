"""``shoal bench registry``: how long look-ups in a registry take, without a server.

What is measured, and how, is ``server/registry_times.py``'s.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict

from shoal.loadtests.measuring import positive, refuse
from shoal.server.cli import registry_parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    registry_parts.add_arguments(parser)
    add = parser.add_argument
    add("--lookups", type=positive, default=5000, help="of each kind; of pages a tenth")
    add("--threads", type=positive, default=1, help="that ask at the same time")
    add("--seed", type=int, default=0, help="of the names that are asked for")
    add("--model", help="the base of its adapters: also measures loading cold ones")
    add("--fill", type=positive, metavar="N",
        help="fill an empty registry with N names; measures publishing, too")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure; prints a table and one JSON line. Returns 0, or 2 when it cannot be done."""
    from shoal.server.registry_times import Asked, measure_registry

    url, store = registry_parts.urls(args)
    asked = Asked(args.lookups, args.threads, args.seed, args.model)
    try:
        result = measure_registry(url, store, asked, fill_with=args.fill or 0)
    except ValueError as problem:
        return refuse(str(problem))
    load = os.getloadavg()[0]
    print(f"{result.adapters} adapters in {result.backend}; load {load:.1f}")
    print(f"opened in {result.opened_s:.2f} s")
    print(f"{'ms':<24} {'calls':>7} {'p50':>8} {'p99':>8} {'max':>8}")
    for what, each in result.times.items():
        print(f"{what:<24} {each.calls:7} {each.p50_ms:8.2f} {each.p99_ms:8.2f} {each.max_ms:8.2f}")
    line = {
        "bench": "registry",
        "backend": result.backend,
        "adapters": result.adapters,
        "opened_s": round(result.opened_s, 3),
        "threads": args.threads,
        "seed": args.seed,
        "cpus": os.cpu_count(),
        "load_1m": round(load, 2),
        "machine": f"{platform.machine()} {platform.system()}",
        "times": {what: asdict(each) for what, each in result.times.items()},
    }
    print(json.dumps(line))
    return 0
