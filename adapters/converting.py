"""Turning adapter directories into others: out of pickles, and into plain PEFT LoRA. Offline.

Owns what ``shoal adapters convert`` does without touching the base: reading a checkpoint that was
saved as a pickle, writing whatever is low-rank as LoRA of the same delta, and making an output
folder that is whole or absent. Merging into a base is in ``merging.py``. The server imports none
of this: an upload is never unpickled.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from shoal.adapters.corrections import explicit
from shoal.adapters.deltas import BaseParts
from shoal.adapters.errors import AdapterError
from shoal.adapters.families import core, fold
from shoal.adapters.formats.config_fields import CONFIG_FILE
from shoal.adapters.formats.container import (
    DTYPES,
    printable,
    read_json,
    tensor_chunks,
    write_atomically,
)
from shoal.adapters.formats.keys import module_path, tensor_name
from shoal.adapters.reading import WEIGHTS_FILE
from shoal.adapters.spec import MODULES, BaseShape, Target
from shoal.adapters.weights import AdapterWeights


class ConversionError(AdapterError):
    """The conversion cannot be done.

    Attributes:
        hint: what to do instead.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@contextmanager
def fresh_directory(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block ends, or is removed when it raises.

    Raises:
        ConversionError: ``out`` is there and not an empty folder. Nothing is overwritten.
        OSError: the folder cannot be made.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConversionError(
            f"{out} exists and is not an empty directory", "name a new one; nothing is overwritten"
        )
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private
        os.replace(scratch, out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


# -------------------------------------------------------------------------------------- pickles


def convert_pickle(pickle: Path, config: Path, out: Path) -> None:
    """Write ``pickle``'s tensors as safetensors and ``config`` unchanged into the folder ``out``.

    Raises:
        ConversionError, AdapterRejected, AdapterTooLarge: an unusable pickle or config.
    """
    read_json(config, CONFIG_FILE)
    tensors = read_pickle(pickle)
    write_atomically(out / WEIGHTS_FILE, tensor_chunks(tensors, {"format": "pt"}))
    write_atomically(out / CONFIG_FILE, [config.read_bytes()])


def read_pickle(path: Path, *, integers: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, by name, on the CPU.

    Only torch's restricted unpickler is used: it builds tensors and plain containers, and refuses
    a pickle that names any other code.

    Args:
        integers: whether tensors of 32- and 64-bit integers are accepted too.

    Raises:
        ConversionError: it holds anything but named float tensors, or cannot be read.
        OSError: there is no such file.
    """
    size = path.stat().st_size
    hint = "only a mapping of names to tensors, saved with torch.save, can be converted"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can make the unpickler raise nearly anything
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])
        raise ConversionError(f"{path.name} cannot be unpickled safely: {reason}", hint) from error
    if not isinstance(content, dict) or not content:
        raise ConversionError(f"{path.name} holds a {type(content).__name__}, no tensors", hint)
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        shown = printable(str(name))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConversionError(
                f"{path.name}: {shown} is a {type(value).__name__}, not a named tensor", hint
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ConversionError(f"{path.name}: {shown} is not a plain dense tensor", hint)
        whole = integers and value.dtype in (torch.int32, torch.int64)
        if value.dtype not in DTYPES.values() and not whole:
            raise ConversionError(
                f"{path.name}: {shown} is {value.dtype}, must be one of {', '.join(DTYPES)}", hint
            )
        tensors[name] = value.detach()
    # A view can claim a shape far larger than what it looks at. Twice leaves room for tied tensors.
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    if total > 2 * size:
        raise ConversionError(
            f"{path.name} has {size} bytes, its tensors claim {total}",
            "save it with tensors of their own: tensor.clone()",
        )
    return tensors


# --------------------------------------------------------------------------------------- to LoRA


@torch.no_grad()
def as_lora(weights: AdapterWeights, base: BaseParts) -> AdapterWeights:
    """The same deltas in the family ``lora``, without a correction.

    ``core``: ``B`` is the basis' and ``A = R BᵀW``, in float64, rounded once to float32.
    ``fold``: ``A`` is the 0/1 matrix of the fold and ``B = Dᵀ``: exact in any dtype.
    A correction of rank q adds as much to the rank, see `corrections.explicit`.

    Raises:
        ConversionError: it is not low-rank: row scales (DoRA), ``spectral``.
        KeyError: a basis is unknown.
    """
    for reason in _not_low_rank(weights):
        raise ConversionError(
            f"{weights.format} is not low-rank: {reason}",
            "`shoal adapters convert --merge` writes the base with it merged in",
        )
    correction = weights.correction
    if correction is not None:
        known = base.basis_of(correction.basis_id)
        return explicit(
            weights, correction.method, correction.ranks, base.weight_of, known, correction.scales
        )
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target, parts in weights.tensors.items():
        if weights.family == "fold":
            tensors[target] = fold.factors(parts[0], base.shape.dims[target.module].d_in)
        elif weights.family == "core":
            assert weights.basis_id is not None
            known_b = base.basis_of(weights.basis_id).factors[target]
            a, b = core.factors(parts[0], known_b, base.weight_of(target))
            tensors[target] = (a.float(), b)
        else:
            tensors[target] = parts
    return AdapterWeights(weights.format, "lora", tensors, weights.scales)


def _not_low_rank(weights: AdapterWeights) -> Iterator[str]:
    if weights.row_scales:
        yield "it multiplies every output of the base by a factor of its own"
    if weights.family == "spectral":
        yield "it changes any of the base's singular values"


def write_plain_lora(weights: AdapterWeights, shape: BaseShape, out: Path, base: str) -> None:
    """Write ``lora`` weights as PEFT does; ranks and scales may differ between targets.

    Args:
        weights: of family ``lora``.
        shape: the base.
        out: an existing folder.
        base: what ``base_model_name_or_path`` says.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[Target, int] = {}
    alphas: dict[Target, float] = {}
    for target, (a, b) in weights.tensors.items():
        tensors[f"{tensor_name(target, 'lora_A')}.weight"] = a
        tensors[f"{tensor_name(target, 'lora_B')}.weight"] = b
        ranks[target] = a.shape[0]
        alphas[target] = _tidy(weights.scales[target] * a.shape[0])
    # What most targets have is the default; the others get patterns, by their full path.
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "alpha_pattern": {module_path(t): v for t, v in alphas.items() if v != alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module_path(t): v for t, v in ranks.items() if v != rank},
        "target_modules": _target_modules(weights, shape),
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(out / WEIGHTS_FILE, tensor_chunks(tensors, {"format": "pt"}))
    write_atomically(out / CONFIG_FILE, [text.encode()])


def _tidy(alpha: float) -> float:
    """``scale * rank`` without the rounding of the division that made the scale."""
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-12 * abs(alpha) else alpha


def _target_modules(weights: AdapterWeights, shape: BaseShape) -> list[str]:
    modules = [m for m in MODULES if any(target.module == m for target in weights.tensors)]
    if len(weights.tensors) == len(modules) * shape.num_layers:
        return modules
    return [module_path(target) for target in weights.tensors]
