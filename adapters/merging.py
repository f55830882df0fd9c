"""Merging an adapter into its base: a Hugging Face directory in, another one out. Offline.

Owns the merged weights: float32 sums, rounded once to the checkpoint's own dtype, written in shards
that hold one shard in memory at a time. MiSS ``bat``, which multiplies the base's weights and so is
served in no other way, is read here and nowhere else.

``bat``: with ``W`` seen as blocks ``W[a, c] (r, r)`` (``a`` along outputs) and one ``D[a] (r, r)``
per block of outputs, ``ΔW[a, c] = W[a, c] D[a] + D[a]``. Source: PEFT 0.14 to 0.21, ``tuners/miss``
and ``tuners/bone``.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.adapters.converting import ConversionError
from shoal.adapters.deltas import Change
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.base import check_shape
from shoal.adapters.formats.config_fields import CONFIG_FILE, check_common, field
from shoal.adapters.formats.container import read_json, read_tensors
from shoal.adapters.formats.keys import group_by_target
from shoal.adapters.reading import WEIGHTS_FILE
from shoal.adapters.spec import MODULES, BaseShape, Target

SHARD_BYTES = 4_000_000_000

_BLOCKS = frozenset({"miss_block", "bone_block"})
_INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Multimodal checkpoints prefix their text model, transformers 4 and 5 differently.
_NAME = re.compile(
    r"(?:language_model\.model|model\.language_model|model)\.layers\.([0-9]{1,6})\."
    rf"(?:self_attn|mlp)\.({'|'.join(MODULES)})\.weight"
)
_COPIED = (".json", ".jinja", ".model", ".txt", ".md")


class Checkpoint:
    """The safetensors files of a Hugging Face directory, read tensor by tensor."""

    def __init__(self, folder: Path, shape: BaseShape) -> None:
        """List the tensors.

        Args:
            folder: with ``config.json`` and safetensors files, in shards or not.
            shape: the base, from its config.

        Raises:
            ConversionError: a file is missing or unreadable, or two hold the same tensor.
        """
        self.folder = folder
        self.shape = shape
        self._file_of: dict[str, Path] = {}
        self._name_of: dict[Target, str] = {}
        for file in self._files():
            for name in _names(file):
                if name in self._file_of:
                    raise _unreadable(file, f"{name} is also in {self._file_of[name].name}")
                self._file_of[name] = file
                target = target_of(name)
                if target is not None:
                    self._name_of[target] = name

    def _files(self) -> list[Path]:
        index = self.folder / _INDEX
        names = ["model.safetensors"]
        if index.is_file():
            weight_map = read_json(index, _INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise _unreadable(index, "it has no weight_map")
            names = sorted({str(name) for name in weight_map.values()})
        return [self.folder / name for name in names]

    def weight_of(self, target: Target) -> Tensor:
        """The weight ``(d_out, d_in)`` of a target, in the checkpoint's dtype.

        Raises:
            ConversionError: it is missing, or has another shape than the config says.
        """
        name = self._name_of.get(target)
        if name is None:
            raise _unreadable(self.folder, f"it has no weight of {target}")
        return self._checked(target, _tensor(self._file_of[name], name))

    def tensor(self, name: str) -> Tensor | None:
        """The tensor that the files call ``name``, or None."""
        file = self._file_of.get(name)
        return None if file is None else _tensor(file, name)

    def tensors(self) -> Iterator[tuple[str, Target | None, Tensor]]:
        """Every tensor, in the order of the files, and the target that it is the weight of."""
        for name, file in self._file_of.items():
            target = target_of(name)
            tensor = _tensor(file, name)
            yield name, target, tensor if target is None else self._checked(target, tensor)

    def _checked(self, target: Target, tensor: Tensor) -> Tensor:
        dims = self.shape.dims[target.module]
        if tuple(tensor.shape) != dims or tensor.dtype not in _DTYPES:
            raise _unreadable(
                self.folder,
                f"{target} is {tensor.dtype} {list(tensor.shape)}, must be float {list(dims)}",
            )
        return tensor


def target_of(name: str) -> Target | None:
    """The target whose weight a checkpoint calls ``name``, or None."""
    match = _NAME.fullmatch(name)
    return None if match is None else Target(int(match[1]), match[2])


# ------------------------------------------------------------------------------------------ bat


def bat_changes(blocks: Mapping[Target, Tensor]) -> dict[Target, Change]:
    """The changes of MiSS ``bat``; see the module. ``blocks``: ``D (d_out/r, r, r)``."""

    def change(block: Tensor) -> Change:
        def added(w: Tensor) -> Tensor:
            d = block.to(w.dtype)
            rank = d.shape[1]
            cut = w.view(d.shape[0], rank, -1, rank)  # (output block, row, input block, column)
            product = torch.einsum("aick,akj->aicj", cut, d)
            return (product + d.unsqueeze(2)).reshape(w.shape)

        return added

    return {target: change(block) for target, block in blocks.items()}


def read_bat(files: Mapping[str, Path], shape: BaseShape) -> dict[Target, Tensor] | None:
    """The blocks ``(d_out/r, r, r)`` of a MiSS or Bone adapter in mode ``bat``; None for any other.

    Raises:
        AdapterRejected, AdapterTooLarge: it is one and cannot be merged; names tensor and rule.
    """
    if not files.keys() >= {CONFIG_FILE, WEIGHTS_FILE}:
        return None  # reading it as an adapter says what is missing
    config = read_json(files[CONFIG_FILE], CONFIG_FILE)
    if config.get("peft_type") not in ("MISS", "BONE"):
        return None
    path = files[WEIGHTS_FILE]
    with path.open("rb") as file:
        tensors, _ = read_tensors(file, path.stat().st_size, WEIGHTS_FILE)
    told = config.get("init_weights") == "bat"
    if not told and not any(tensor.ndim == 3 for tensor in tensors.values()):
        return None
    check_common(config)
    blocks: dict[Target, Tensor] = {}
    for target, parts in group_by_target(tensors, _BLOCKS, "MiSS bat", shape).items():
        named = next(iter(parts.values()))
        if len(parts) != 1 or named.tensor.ndim != 3:
            raise AdapterRejected(named.name, "bat holds one block (d_out/r, r, r) per module")
        rank, dims = named.tensor.shape[2], shape.dims[target.module]
        if "r" in config and config["r"] != rank:
            raise AdapterRejected(field("r"), f"must be {rank}, the rank of {named.name}")
        if dims.d_out % rank or dims.d_in % rank:
            raise AdapterRejected(named.name, f"rank {rank} must divide {dims.d_out}, {dims.d_in}")
        blocks[target] = check_shape(named, dims.d_out // rank, rank, rank)
    if not blocks:
        raise AdapterRejected(WEIGHTS_FILE, "holds no tensors")
    return blocks


# -------------------------------------------------------------------------------------- writing


def write_merged(
    base: Checkpoint,
    changes: Mapping[Target, Change],
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the base with ``changes`` merged into the existing empty folder ``out``.

    Names and dtypes of the tensors, the config and the tokenizer stay as they are.

    Args:
        base: what is merged into.
        changes: per target; the others are copied.
        out: gets safetensors, an index if there are several, and the base's small files.
        shard_bytes: most tensor bytes per file (a single tensor may exceed it).

    Raises:
        ConversionError: the base lacks a target, or a merged weight overflows its dtype.
        OSError: the files cannot be written.
    """
    left = set(changes)
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        save_file(held, out / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, target, tensor in base.tensors():
        if target in left:
            tensor = _merged(name, tensor, changes[target])
            left.discard(target)
        num_bytes = tensor.numel() * tensor.dtype.itemsize
        if held and held_bytes + num_bytes > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor
        held_bytes += num_bytes
        total_bytes += num_bytes
    if left:
        raise _unreadable(base.folder, f"it has no weight of {min(left)}")
    flush()
    _name_shards(out, shards, total_bytes)
    for file in base.folder.iterdir():
        plain = file.suffix in _COPIED or file.name.startswith(("LICENSE", "NOTICE"))
        if plain and file.is_file() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)


@torch.no_grad()
def _merged(name: str, tensor: Tensor, change: Change) -> Tensor:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    merged = (wide + change(wide)).to(tensor.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise ConversionError(
            f"{name}: the merged weight overflows {tensor.dtype}",
            "merge into a checkpoint of the base in bfloat16 or float32",
        )
    return merged


def _name_shards(out: Path, shards: list[list[str]], total_bytes: int) -> None:
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        many = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = out / (many if len(shards) > 1 else "model.safetensors")
        (out / f"{i}.part").rename(file)
        file.chmod(0o644)  # safetensors makes it private
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, str(error)) from error


def _tensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, str(error)) from error


def _unreadable(path: Path, reason: str) -> ConversionError:
    return ConversionError(
        f"base {path} cannot be used: {reason}",
        "a base is a Hugging Face directory with config.json and its safetensors files",
    )
