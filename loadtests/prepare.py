"""``shoal bench prepare``: what a benchmark over HTTP needs where no checkpoint is at hand.

A model directory without weights and random adapters for the server that serves it, then the
commands to run. What is in the files is ``server/dummy_files.py``'s.
"""

import argparse
import shlex
from pathlib import Path

from shoal.loadtests.measuring import positive, refuse, say
from shoal.server.model.shapes import SHAPES

# Of the commands to run next.
MAX_MODEL_LEN = 1024
STREAMS_MAX = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="gets model/ and adapters/, both new")
    add("--model-shape", choices=sorted(SHAPES), default="llama-3.1-8b", help="shape of the base")
    add("--adapters", type=positive, default=256, help="how many: load-0000 and so on")
    add("--family", choices=("core", "fold", "lora"), default="core",
        help="LoRA-XS, MiSS or LoRA, on every linear of every layer")  # fmt: skip
    add("--rank", type=positive, default=16, help="of the adapters")
    group = parser.add_argument_group("of the server", "as it will be told; files are for it alone")
    add = group.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs")
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="what it runs in")  # fmt: skip
    add("--basis-rank", type=positive, default=64, help="of the basis that core adapters share")


def run(args: argparse.Namespace) -> int:
    """Write the files and say what to run next; returns 0, or 2 when it cannot be done as asked."""
    from tqdm import tqdm  # these two not above: the offline benchmark does without them

    from shoal.server.dummy_files import ADAPTERS, MODEL, DummyFiles, write_dummy_files

    asked = DummyFiles(
        model_shape=args.model_shape,
        adapters=args.adapters,
        family=args.family,
        rank=args.rank,
        basis_rank=args.basis_rank,
        device=args.device,
        dtype=args.dtype,
    )
    directory: Path = args.directory
    try:
        with tqdm(total=args.adapters, unit="adapter", desc="writing", disable=None) as bar:
            write_dummy_files(asked, directory, lambda done, of: bar.update())
    except (OSError, ValueError) as problem:
        return refuse(str(problem))
    first = next((directory / ADAPTERS).iterdir())
    size = sum(path.stat().st_size for path in first.iterdir())
    say(f"{args.adapters} {args.family} adapters of rank {args.rank}, {size:,} bytes each")
    print("\n".join(_next(args, directory / MODEL, directory / ADAPTERS)))
    return 0


def _next(args: argparse.Namespace, model: Path, adapters: Path) -> list[str]:
    """Commands: the server; then uploads and the base; then the adapters under the same load."""
    own = [
        word
        for flag, default in (("device", "auto"), ("dtype", "auto"), ("basis_rank", 64))
        if (value := getattr(args, flag)) != default
        for word in (f"--{flag.replace('_', '-')}", str(value))
    ]
    streams = str(min(args.adapters, STREAMS_MAX))
    serve = ["shoal", "serve", str(model), "--load-format", "dummy"]
    load = ["shoal", "bench", "serve", "--num-prompts", streams]
    load += ["--input-len", "128", "--output-len", "128"]
    commands = (
        [*serve, "--max-model-len", str(MAX_MODEL_LEN), *own],
        [*load, "--upload", str(adapters)],
        [*load, "--adapters", "load-*", "--popularity", "each"],
    )
    return [shlex.join(words) for words in commands]
