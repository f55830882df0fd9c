"""Loads the base model and its tokenizer through transformers, for training.

It knows nothing of adapters or data.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.adapters.base import base_digest
from shoal.adapters.training.errors import BaseRejected


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
    model: nn.Module
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device


def load_base(path: Path, device: str, dtype: str) -> Base:
    """Read a Hugging Face directory or a ``.gguf`` file (dequantised).

    Args:
        path: the directory or file.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16``, or ``auto``: float32 on a CPU, bfloat16 on CUDA.

    Raises:
        BaseRejected: transformers cannot read it as a decoder with a tokenizer.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BaseRejected("device is cuda: this machine has no CUDA device")
    if not path.exists():
        raise BaseRejected(f"base {path} does not exist")
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.is_file():
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        digest = base_digest(path)
        tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=getattr(torch, dtype), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseRejected(f"base {path} cannot be loaded: {error}") from error
    return Base(path, digest, model.to(device).eval(), tokenizer)
