"""Files to load ``shoal serve --load-format dummy`` with: a model without weights, and adapters.

Such a server draws its weights, and the basis that LoRA-XS adapters share, at random. The same
basis is drawn here, so the adapters are at home on a server on the same kind of device, in the same
dtype and with the same basis rank, and nowhere else.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from shoal.adapters.basis import Basis
from shoal.adapters.formats.writing import write_compact_lora_xs, write_lora, write_miss
from shoal.adapters.spec import BaseShape
from shoal.server.assemble import resolve_device, torch_dtype
from shoal.server.config import resolve_dtype
from shoal.server.model.config import ModelConfig
from shoal.server.model.dummy import DummyFamily, adapter_std, dummy_basis
from shoal.server.model.shapes import SHAPES

MODEL, ADAPTERS = "model", "adapters"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DummyFiles:
    """What to make, and for which server.

    Attributes:
        model_shape: one of ``SHAPES``.
        adapters: how many; each changes every target of the model.
        family: ``core`` is LoRA-XS in its compact layout, ``fold`` MiSS, ``lora`` LoRA.
        rank: of the adapters.
        basis_rank, device, dtype: as the server will be told.
    """

    model_shape: str
    adapters: int
    family: DummyFamily = "core"
    rank: int = 16
    basis_rank: int = 64
    device: str = "auto"
    dtype: str = "auto"


def write_dummy_files(
    asked: DummyFiles, folder: Path, progress: Progress = lambda done, of: None
) -> None:
    """Write ``folder/model`` and ``folder/adapters/load-0000`` and so on.

    Args:
        folder: made if it is not there.
        progress: called with (adapters written, adapters in all).

    Raises:
        ValueError: the rank does not fit the model or its basis, there is no such device, or the
            model or adapters are there already, perhaps another server's.
    """
    config = ModelConfig.from_hf(SHAPES[asked.model_shape])
    device = resolve_device(asked.device)
    checkpoint_dtype = config.dtype or "float32"
    dtype = torch_dtype(
        resolve_dtype(asked.dtype, device=device.type, checkpoint_dtype=checkpoint_dtype)
    )
    _check_rank(asked, config.base_shape(MODEL, ""))
    for part in (folder / MODEL, folder / ADAPTERS):
        if part.exists():
            raise ValueError(f"{part} is there already: remove it, or name another folder")
    (folder / MODEL).mkdir(parents=True)
    _write_model(folder / MODEL, asked.model_shape)
    shape, basis = dummy_basis(config, MODEL, asked.basis_rank, device, dtype)
    numbers = torch.Generator(device).manual_seed(1)
    for i in range(asked.adapters):
        own = folder / ADAPTERS / f"load-{i:04d}"
        _write_adapter(own, asked.family, asked.rank, shape, basis, dtype, numbers)
        progress(i + 1, asked.adapters)


def _check_rank(asked: DummyFiles, shape: BaseShape) -> None:
    most = min(min(dims) for dims in shape.dims.values())
    if asked.family == "core":
        most = min(most, asked.basis_rank)
    if not 1 <= asked.rank <= most:
        raise ValueError(f"the rank is {asked.rank}: must be from 1 to {most} here")


def _write_model(folder: Path, model_shape: str) -> None:
    """The shape as a checkpoint's config says it, and a tokenizer: bytes, the rest never used."""
    fields = SHAPES[model_shape]
    (folder / "config.json").write_text(json.dumps(dict(fields), indent=2) + "\n")
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"<unused{i}>" for i in range(len(pieces), fields["vocab_size"])]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def _write_adapter(
    folder: Path,
    family: DummyFamily,
    rank: int,
    shape: BaseShape,
    basis: Basis,
    dtype: torch.dtype,
    numbers: torch.Generator,
) -> None:
    """One adapter on every target, at scale 1; LoRA-XS in float32, as training leaves it."""
    std = adapter_std(family, rank)
    dims = {target: shape.dims[target.module] for target in shape.targets()}

    def drawn(rows: int, columns: int) -> Tensor:
        values = torch.empty(rows, columns, device=numbers.device)
        return values.normal_(0.0, std, generator=numbers)

    if family == "core":
        r = {target: drawn(rank, rank) for target in dims}
        write_compact_lora_xs(folder, r, alpha=rank, rank=rank, basis=basis, shape=shape)
    elif family == "fold":
        d = {target: drawn(rank, own.d_out).to(dtype) for target, own in dims.items()}
        write_miss(folder, d, rank=rank, shape=shape)
    else:
        ab = {
            target: (drawn(rank, own.d_in).to(dtype), drawn(own.d_out, rank).to(dtype))
            for target, own in dims.items()
        }
        write_lora(folder, ab, alpha=rank, rank=rank, shape=shape)
