"""``shoal basis export|import``: carry a base's canonical LoRA-XS basis to another machine.

Machines compute bases that agree to rounding, so this is rarely needed: it saves the computation,
and it makes adapters match by id rather than by their probes.
"""

import argparse
import shutil
import sys
from pathlib import Path

import platformdirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="basis_verb", required=True)
    for name, help in (
        ("export", "write the basis of MODEL to FILE, computing it if need be"),
        ("import", "use the basis in FILE for MODEL on this machine"),
    ):
        verb = verbs.add_parser(name, help=help, description=help)
        verb.add_argument("file", type=Path, metavar="FILE")
        verb.add_argument("--model", default="smollm2", help="base model (default: %(default)s)")
        verb.add_argument("--basis-rank", type=int, default=64, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from shoal.adapters.base import base_digest
    from shoal.adapters.basis import canonical_path, load_basis, save_basis
    from shoal.adapters.errors import AdapterError
    from shoal.server.assemble import canonical_file
    from shoal.server.model.config import ModelError
    from shoal.server.model.pull import resolve_model
    from shoal.server.model.weights import read_config

    cache = platformdirs.user_cache_path("shoal") / "bases"
    try:
        path = resolve_model(args.model)
        if args.basis_verb == "import":
            shape = read_config(path).base_shape(path.stem, base_digest(path))
            cached = canonical_path(cache, shape, args.basis_rank)
            basis = load_basis(args.file, shape)
            if basis.rank != args.basis_rank:
                raise ValueError(f"{args.file} has rank {basis.rank}, not {args.basis_rank}")
            cache.mkdir(parents=True, exist_ok=True)
            save_basis(basis, cached)
            print(f"{cached}  {basis.id}")
            return 0
        _, cached = canonical_file(path, args.basis_rank)
        shutil.copyfile(cached, args.file)
        print(f"{args.file}  {load_basis(args.file, shape).id}")
    except (AdapterError, ModelError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0
