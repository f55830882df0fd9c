"""``shoal bench archive``: many random LoRA-XS adapters of a base, for ``shoal adapters import``.

What is in the archive is ``server/dummy_archive.py``'s.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import BinaryIO

from shoal.loadtests.measuring import positive, refuse, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("file", metavar="FILE", help="a new file; - is standard output")
    add("--model", default="smollm2", help="the base, as for serve")
    add("--adapters", type=positive, default=1_000_000, help="how many: u0000000 and so on")
    add("--rank", type=positive, default=4, help="of each R, on every linear of every layer")
    add("--seed", type=int, default=0, help="of their values")
    add("--basis-rank", type=positive, default=64, help="of the base's basis, as for serve")


def run(args: argparse.Namespace) -> int:
    """Write the archive; returns 0, or 2 when it cannot be done as asked."""
    from tqdm import tqdm  # these not above: the offline benchmark does without them

    from shoal.server.dummy_archive import DummyArchive, write_dummy_archive
    from shoal.server.model.config import ModelError

    asked = DummyArchive(
        model=args.model,
        adapters=args.adapters,
        rank=args.rank,
        seed=args.seed,
        basis_rank=args.basis_rank,
    )
    try:
        with (
            _opened(args.file) as out,
            tqdm(total=asked.adapters, unit="adapter", desc="making", disable=None) as bar,
        ):
            write_dummy_archive(asked, out, lambda done, of: bar.update(done - bar.n))
            out.flush()
    except BrokenPipeError:
        return refuse("whoever reads the archive has stopped")
    except (ModelError, OSError, ValueError) as problem:
        return refuse(str(problem))
    say(f"{asked.adapters} adapters of rank {asked.rank} for {asked.model}")
    return 0


def _opened(name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if name == "-":
        return contextlib.nullcontext(sys.stdout.buffer)
    return Path(name).open("xb")
