"""The linears of a decoder that can be adapted: where they are, their shapes and weights."""

import re

from torch import Tensor, nn

from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.training.errors import BaseRejected, OptionRejected
from shoal.adapters.weights import WeightOf

_LINEAR_NAME = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)$")


def find_linears(model: nn.Module) -> dict[Target, tuple[str, nn.Linear]]:
    """Every adaptable linear of a decoder, with its module name, in target order.

    Raises:
        BaseRejected: there are none, or the layers are not alike.
    """
    found: dict[Target, tuple[str, nn.Linear]] = {}
    for name, module in model.named_modules():
        match = _LINEAR_NAME.match(name)
        if match is None or match[2] not in MODULES or not isinstance(module, nn.Linear):
            continue
        target = Target(int(match[1]), match[2])
        if target in found:
            raise BaseRejected(f"{name} and {found[target][0]} both claim to be {target}")
        found[target] = (name, module)
    num_layers = 1 + max((target.layer for target in found), default=-1)
    expected = [Target(layer, module) for layer in range(num_layers) for module in MODULES]
    if not expected or set(expected) != set(found):
        missing = [str(target) for target in expected if target not in found][:3]
        raise BaseRejected(
            f"{type(model).__name__} lacks the linears {missing or list(MODULES)}: a base needs "
            f"{', '.join(MODULES)} in each of its layers"
        )
    return {target: found[target] for target in expected}


def shape_of(model: nn.Module, name: str, digest: str) -> BaseShape:
    """The adaptable linears' shapes. Call before an adapter is put on.

    Raises:
        BaseRejected: as ``find_linears``, or a linear's shape differs from layer to layer.
    """
    dims: dict[str, Dims] = {}
    linears = find_linears(model)
    for target, (where, linear) in linears.items():
        own = Dims(linear.out_features, linear.in_features)
        if dims.setdefault(target.module, own) != own:
            expected = dims[target.module]
            raise BaseRejected(f"{where} is {own}, in layer 0 it is {expected}: must be the same")
    return BaseShape(name, digest, 1 + max(target.layer for target in linears), dims)


def weight_reader(model: nn.Module) -> WeightOf:
    """Reads the base weight of a target. Call before an adapter is put on."""
    linears = {target: linear for target, (_, linear) in find_linears(model).items()}

    def weight_of(target: Target) -> Tensor:
        return linears[target].weight.detach()

    return weight_of


def check_rank(
    rank: int,
    linear: nn.Linear,
    target: Target,
    limit: int | None = None,
    option: str = "rank",
) -> None:
    """OptionRejected when a rank exceeds what a linear allows.

    Args:
        rank: what was asked for.
        linear: whose it is to be.
        target: for the message.
        limit: the largest rank; None: the linear's smaller side.
        option: which option asked for it.
    """
    most = min(linear.in_features, linear.out_features) if limit is None else limit
    if rank > most:
        raise OptionRejected(option, rank, f"must not exceed {most}, as {target} allows")
