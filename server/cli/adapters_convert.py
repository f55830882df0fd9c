"""``shoal adapters convert SRC OUT``: out of a pickle, into LoRA or LoRA-XS, or a merged base.

Owns the order of the steps and the messages; ``converting``, ``projecting`` and ``merging`` in
``shoal.adapters`` do the work. ``OUT`` appears when all of it is there, or not at all.
"""

import argparse
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.server.cli import adapters_base, adapters_checkpoints

if TYPE_CHECKING:  # torch takes seconds that `--help` should not
    from shoal.adapters.weights import AdapterWeights

HELP = "convert an adapter directory: from a pickle, to LoRA or LoRA-XS, or merged into its base"

# A tool for one's own files: these only keep a few bytes of MiSS `mini` from filling the memory.
BYTES_MAX = 16 << 30
RANK_MAX = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="an adapter directory, or the pickle in one"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty directory")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--to",
        choices=("lora", "lora-xs"),
        help="lora: the same adapter as plain PEFT LoRA, where it is low-rank; lora-xs: the "
        "nearest adapter on the base's own basis, with what that loses",
    )
    what.add_argument(
        "--merge",
        action="store_true",
        help="write the base with the adapter merged in (also for MiSS bat); the base must be a "
        "Hugging Face directory",
    )
    parser.add_argument(
        "--rank",
        type=adapters_base.positive,
        default=16,
        help="of --to lora-xs (default: %(default)s)",
    )
    adapters_base.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0: ``OUT`` is there. 1: nothing was written."""
    from shoal.adapters.converting import ConversionError, fresh_directory
    from shoal.adapters.errors import AdapterError
    from shoal.adapters.registry.errors import RegistryError
    from shoal.server.model.config import ModelError

    try:
        with fresh_directory(args.out) as scratch:
            made = _convert(args, scratch)
    except ConversionError as problem:
        return _failed(problem, problem.hint)
    except AdapterError as problem:
        return _failed(problem, "`shoal adapters check` says what a server makes of an adapter")
    except ModelError as problem:
        return _failed(problem, "--base names what the adapter was made for")
    except (RegistryError, OSError) as problem:
        return _failed(problem, "check that the paths are right, and that OUT can be written")
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}  {made}  {size} bytes")
    return 0


def _failed(problem: Exception, hint: str) -> int:
    print(f"error: {problem}\nhint: {hint}", file=sys.stderr)
    return 1


def _convert(args: argparse.Namespace, out: Path) -> str:
    """Fill ``out``; returns what it is."""
    import tempfile

    from shoal.adapters.converting import ConversionError, convert_pickle
    from shoal.adapters.formats.config_fields import CONFIG_FILE
    from shoal.adapters.reading import WEIGHTS_FILE

    with tempfile.TemporaryDirectory(prefix="shoal-convert-") as folder:
        plain = out if not args.to and not args.merge else Path(folder)
        made = adapters_checkpoints.convert(args, plain)
        files: Mapping[str, Path] = {}
        if made is None:
            files = _source_files(args.source)
            pickles = [files[name] for name in files if name not in (CONFIG_FILE, WEIGHTS_FILE)]
            if pickles:
                convert_pickle(pickles[0], files[CONFIG_FILE], plain)
                made = "the same adapter as safetensors"
        if made is not None:
            files = {name: plain / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
        if args.merge:
            return _merge(args, files, out)
        if args.to:
            return (_to_lora if args.to == "lora" else _to_lora_xs)(args, files, out)
    if made is None:
        raise ConversionError(
            f"{args.source} holds no pickle: there is nothing to convert",
            "say what it should become: --to lora, --to lora-xs, or --merge --base MODEL",
        )
    return made


def _source_files(source: Path) -> dict[str, Path]:
    """The config and the weights of ``source``; the weights under their own file name."""
    from shoal.adapters.converting import ConversionError
    from shoal.adapters.formats.config_fields import CONFIG_FILE
    from shoal.adapters.reading import adapter_files

    if source.is_file():
        config = source.with_name(CONFIG_FILE)
        if not config.is_file():
            raise ConversionError(f"{source} has no {CONFIG_FILE} beside it", "put it there")
        return {CONFIG_FILE: config, source.name: source}
    if not source.is_dir():
        raise ConversionError(f"{source} does not exist", "give an adapter directory")
    files = adapter_files(source)
    if len(files) == 1:
        raise ConversionError(
            f"{source} has no adapter_model.safetensors, .bin or .pt",
            "give the pickle itself if it has another name",
        )
    return files


def _to_lora(args: argparse.Namespace, files: Mapping[str, Path], out: Path) -> str:
    from shoal.adapters.converting import ConversionError, as_lora, write_plain_lora
    from shoal.adapters.formats.config_fields import CONFIG_FILE
    from shoal.adapters.formats.container import read_json
    from shoal.adapters.reading import WEIGHTS_FILE

    look = adapters_base.look_at(files)
    with _opened(args, look) as base:
        weights = _read(base, files)
        if weights.format == "lora" and not look.corrected:
            raise ConversionError(
                f"{args.source} is LoRA already",
                "a pickle becomes safetensors without --to"
                if files[WEIGHTS_FILE].parent != args.source
                else "use it as it is",
            )
        plain = as_lora(weights, base.parts())
        told = read_json(files[CONFIG_FILE], CONFIG_FILE).get("base_model_name_or_path")
        name = told if isinstance(told, str) and told else args.base
        write_plain_lora(plain, base.shape, out, name)
    return f"lora r={plain.rank}, {len(plain.tensors)} targets"


def _to_lora_xs(args: argparse.Namespace, files: Mapping[str, Path], out: Path) -> str:
    """Prints how much of each target is lost."""
    from shoal.adapters.converting import ConversionError
    from shoal.adapters.formats.writing import write_compact_lora_xs
    from shoal.adapters.projecting import project

    if args.rank > args.basis_rank:
        raise ConversionError(
            f"--rank {args.rank} exceeds the basis' {args.basis_rank}",
            "ask for less, or for a --basis-rank that the server has too",
        )
    spectral = adapters_base.look_at(files).spectral
    with adapters_base.offline_base(args, need_basis=True, need_spectral=spectral) as base:
        found = project(_read(base, files), base.parts(), base.canonical, args.rank)
        write_compact_lora_xs(
            out, found.r, alpha=args.rank, rank=args.rank, basis=base.canonical, shape=base.shape
        )
    width = max(len(str(target)) for target in found.r)
    print("relative error, ‖ΔW − B R BᵀW‖ / ‖ΔW‖:")
    for target in found.r:
        print(f"  {target!s:<{width}}  {found.relative(target):.4f}")
    print(f"  {'in total':<{width}}  {found.total:.4f}")
    return f"lora-xs r={args.rank}, {len(found.r)} targets, relative error {found.total:.4f}"


def _merge(args: argparse.Namespace, files: Mapping[str, Path], out: Path) -> str:
    from shoal.adapters.converting import ConversionError
    from shoal.adapters.deltas import Change, changes
    from shoal.adapters.merging import Checkpoint, bat_changes, read_bat, write_merged
    from shoal.adapters.spec import Target
    from shoal.server.model.pull import SMOLLM2

    # Before the base is opened: it may have to be fetched.
    is_gguf = args.base == SMOLLM2 or args.base.endswith(".gguf")
    if is_gguf and not Path(args.base).is_dir():
        raise ConversionError(
            f"--base {args.base} is a GGUF file; merging needs a Hugging Face directory",
            "give --base the directory of the unquantised model: config.json and safetensors",
        )
    look = adapters_base.look_at(files)
    with _opened(args, look) as base:
        checkpoint = Checkpoint(base.path, base.shape)
        blocks = read_bat(files, base.shape)
        found: dict[Target, Change]
        if blocks is not None:
            found = bat_changes(blocks)
        else:
            found = changes(_read(base, files), base.parts())
        write_merged(checkpoint, found, out)
    return f"base with {len(found)} merged targets"


def _opened(
    args: argparse.Namespace, look: adapters_base.Look
) -> AbstractContextManager[adapters_base.OfflineBase]:
    compact = look.layout == "compact"
    return adapters_base.offline_base(args, need_basis=compact, need_spectral=look.spectral)


def _read(base: adapters_base.OfflineBase, files: Mapping[str, Path]) -> "AdapterWeights":
    """With its own factors wherever no known basis has them: nothing is kept for others."""
    return base.read(files, max_bytes=BYTES_MAX, max_bases=0, max_rank=RANK_MAX)
