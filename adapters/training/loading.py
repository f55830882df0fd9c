"""Loads the base model and its tokenizer through transformers, for training.

It knows nothing of adapters or data.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shoal.adapters.base import base_digest
from shoal.adapters.spec import Target
from shoal.adapters.training.config import MAX_LENGTH, TrainConfig
from shoal.adapters.training.data import Example
from shoal.adapters.training.errors import BaseRejected, OptionRejected
from shoal.adapters.training.methods.attaching import weight_reader
from shoal.adapters.weights import WeightOf


@dataclass(frozen=True, slots=True)
class Base:
    """A base model ready to be trained on.

    Attributes:
        path: where it was read from.
        digest: sha256 of its files, see ``base_digest``.
        model: a transformers decoder in evaluation mode.
        tokenizer: its transformers tokenizer.
    """

    path: Path
    digest: str
    model: PreTrainedModel
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device


def device_of(asked: str, local_rank: int = 0) -> torch.device:
    """Where to train.

    Args:
        asked: ``auto``, ``cpu`` or ``cuda``.
        local_rank: which of the machine's GPUs.

    Raises:
        BaseRejected: there is no such device.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and found == 0):
        cpu: torch.device = torch.device("cpu")
        return cpu
    if found == 0:
        raise BaseRejected("device is cuda: this machine has no CUDA device")
    if local_rank >= found:
        raise BaseRejected(f"process {local_rank} needs a GPU of its own: there are {found}")
    device: torch.device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def load_base(path: Path, device: torch.device, dtype: str) -> Base:
    """Read a Hugging Face directory or a ``.gguf`` file (dequantised).

    Args:
        path: the directory or file.
        device: where the model goes.
        dtype: ``float32``, ``bfloat16``, or ``auto``: float32 on a CPU, bfloat16 on CUDA.

    Raises:
        BaseRejected: transformers cannot read it as a decoder with a tokenizer, or finds no value
            for some of its weights.
    """
    if not path.exists():
        raise BaseRejected(f"base {path} does not exist")
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.is_file():
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    try:
        digest = base_digest(path)
        tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported, and refused below by name
            output_loading_info=True,
        )
    # Readers of damaged files raise whatever they come upon, struct.error and SafetensorError too.
    except Exception as error:
        raise BaseRejected(f"base {path} cannot be loaded: {error}") from error
    _refuse_random_weights(path, report)
    return Base(path, digest, model.to(device).eval(), tokenizer)


def _refuse_random_weights(path: Path, report: dict[str, Any]) -> None:
    """Transformers draws at random what a checkpoint lacks: nobody serves such a model."""
    missing = sorted(report["missing_keys"])
    if missing:
        rule = f"lacks {len(missing)} of the model's weights, such as {missing[0]}"
        raise BaseRejected(f"base {path} {rule}")
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        rule = f"has {name} of {tuple(stored)}, where its config says {tuple(wanted)}"
        raise BaseRejected(f"base {path} {rule}")


def fitting(config: TrainConfig, base: Base) -> TrainConfig:
    """``config`` with records no longer than what the base was made for.

    Raises:
        OptionRejected: longer ones were asked for.
    """
    context = getattr(base.model.config, "max_position_embeddings", None)
    if not isinstance(context, int) or config.max_length <= context:
        return config
    if config.max_length != MAX_LENGTH:
        rule = f"must not exceed {context}, the base's context"
        raise OptionRejected("max-length", config.max_length, rule)
    return replace(config, max_length=context)


def check_tokens(base: Base, examples: Sequence[Example]) -> None:
    """BaseRejected when the tokenizer gave the examples tokens that the model does not have."""
    rows = base.model.get_input_embeddings().weight.shape[0]
    if len(base.tokenizer) <= rows:
        return
    largest = max(max(example.input_ids) for example in examples)
    if largest >= rows:
        token = base.tokenizer.convert_ids_to_tokens(largest)
        rule = f"the data has token {largest} ({token!r}), and the model {rows} tokens"
        raise BaseRejected(f"base {base.path} has a tokenizer that is not the model's: {rule}")


def exact_weights(base: Base) -> WeightOf:
    """The base's weights before they were rounded to what it trains in, read when asked for.

    A basis is shared by everyone with this base, so it must not depend on one run's dtype. Call it
    before an adapter is put on.
    """
    if next(base.model.parameters()).dtype == torch.float32:
        return weight_reader(base.model)

    @functools.cache
    def exact() -> WeightOf:
        return weight_reader(load_base(base.path, torch.device("cpu"), "float32").model)

    def weight_of(target: Target) -> Tensor:
        return exact()(target).to(base.device)

    return weight_of
