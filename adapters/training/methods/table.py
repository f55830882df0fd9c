"""Which class a method's name stands for, and putting it on a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from shoal.adapters.spec import Target
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import MethodName
from shoal.adapters.training.methods.adalora import Adalora
from shoal.adapters.training.methods.attaching import find_linears
from shoal.adapters.training.methods.contract import AdaptedLinear, Method, Start
from shoal.adapters.training.methods.dora import Dora
from shoal.adapters.training.methods.lora import Lora, LoraPlus, RsLora
from shoal.adapters.training.methods.lora_xs import LoraXs
from shoal.adapters.training.methods.miss import Miss
from shoal.adapters.training.methods.residual import Milora, Pissa
from shoal.adapters.training.methods.sharing import share_inputs
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.svf import Svf
from shoal.adapters.training.methods.svft import Svft
from shoal.adapters.training.methods.vera import Vera

METHODS: Mapping[MethodName, type[Method]] = {
    each.name: each
    for each in (
        Lora,
        RsLora,
        LoraPlus,
        Dora,
        Pissa,
        Milora,
        LoraXs,
        Miss,
        Adalora,
        Vera,
        Svf,
        Svft,
    )
}


def method_of(config: TrainConfig) -> Method:
    """The method as the options ask for it."""
    return METHODS[config.method].of(config)


def attach_all(
    model: nn.Module, config: TrainConfig, source: Source, seeds: Sequence[int] | None = None
) -> dict[Target, AdaptedLinear]:
    """Freeze the model and put fresh adapters on the targeted linears, in place.

    Args:
        model: a transformers decoder.
        config: method, its options, and targets.
        source: the base; must have been made before, of the same model or its checkpoint.
        seeds: one a lane; None: one lane, with the config's.

    Raises:
        OptionRejected: an option does not fit a linear.
        BaseRejected: the model is not a decoder of the expected kind.
    """
    model.requires_grad_(False)
    method = method_of(config)
    lanes = (config.seed,) if seeds is None else seeds
    start = Start([torch.Generator().manual_seed(seed) for seed in lanes], source)
    adapted: dict[Target, AdaptedLinear] = {}
    for target, (name, linear) in find_linears(model).items():
        if target.module not in config.targets:
            continue
        adapted[target] = method.attach(linear, target, start)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, adapted[target])
    share_inputs(adapted)
    return adapted
