"""Activation checkpointing: a layer's inner values are computed again instead of being kept."""

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shoal.adapters.training.errors import BaseRejected


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Make a decoder keep only what goes into each layer; the backward pass computes it again.

    Transformers' own switch works only in training mode, where a base may have dropout. Nothing
    here draws random numbers, so no random state is kept (it could not be, in a CUDA graph).

    Raises:
        BaseRejected: the decoder has no list of layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise BaseRejected(f"{type(model).__name__} has no list of layers to checkpoint")
    for layer in layers:
        layer.forward = functools.partial(_again, layer.forward)


def _again(forward: Any, *arguments: Any, **options: Any) -> Any:
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
