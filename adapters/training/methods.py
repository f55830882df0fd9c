"""What each training method adds to a frozen linear, and how an adapter is put on a model.

With ``x`` a row vector, ``y0 = x Wᵀ`` without bias and ``s`` the scale:

==========  =======================  ==================  ===========================
method      delta                    trained             starts at
==========  =======================  ==================  ===========================
lora-xs     ``s·((y0 B) Rᵀ) Bᵀ``     ``R (r, r)``        normal, standard deviation 1e-5
miss        ``S_r(x) D``             ``D (r, d_out)``    zeros
lora        ``s·(x Aᵀ) Bᵀ``          ``A``, ``B``        Kaiming uniform; zeros
==========  =======================  ==================  ===========================

``B`` of LoRA-XS is the base's shared basis, frozen. Trained values are float32 whatever the base
is. It knows nothing of data, files or optimisers.

Sources: LoRA-XS (arXiv 2405.17604), MiSS (arXiv 2409.15371), LoRA (arXiv 2106.09685).
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.spec import MODULES, BaseShape, Dims, Family, Target
from shoal.adapters.training.config import MethodName, TrainConfig
from shoal.adapters.training.errors import BaseRejected, OptionRejected
from shoal.adapters.weights import AdapterWeights, WeightOf

_LINEAR_NAME = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+_proj)$")
_CORE_STD = 1e-5  # the LoRA-XS authors' initial R

_FAMILY: Mapping[MethodName, Family] = {"lora-xs": "core", "miss": "fold", "lora": "lora"}
_FORMAT: Mapping[MethodName, str] = {"lora-xs": "lora_xs", "miss": "miss", "lora": "lora"}


class AdaptedLinear(nn.Module):
    """A frozen linear and one adapter's delta, added before the bias.

    The sub-classes own the trained parameters and say how they are stored.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``(…, d_in)`` -> ``(…, d_out)`` in the base's dtype."""
        y0 = F.linear(x, self.linear.weight)
        y = y0 + self.delta(x, y0)
        return y if self.linear.bias is None else y + self.linear.bias

    def delta(self, x: Tensor, y0: Tensor) -> Tensor:
        """What the adapter adds, ``(…, d_out)``."""
        raise NotImplementedError

    def factors(self) -> tuple[nn.Parameter, ...]:
        """The trained parameters, as ``AdapterWeights.tensors`` orders them."""
        raise NotImplementedError


class CoreLinear(AdaptedLinear):
    """LoRA-XS: an ``(r, r)`` core between the frozen basis ``(d_out, r)`` and its transpose."""

    basis: Tensor

    def __init__(
        self, linear: nn.Linear, basis: Tensor, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__(linear)
        rank = basis.shape[1]
        self.scale = scale
        self.register_buffer("basis", basis.to(linear.weight), persistent=False)
        start = torch.randn((rank, rank), generator=generator) * _CORE_STD
        self.core = nn.Parameter(start.to(linear.weight.device))

    def delta(self, x: Tensor, y0: Tensor) -> Tensor:
        """``s·((y0 B) Rᵀ) Bᵀ``."""
        h = F.linear((y0 @ self.basis).to(self.core.dtype), self.core) * self.scale
        return F.linear(h.to(y0.dtype), self.basis)

    def factors(self) -> tuple[nn.Parameter, ...]:
        """``(R,)``."""
        return (self.core,)


class FoldLinear(AdaptedLinear):
    """MiSS: the input folded with stride r, times ``D (r, d_out)``."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear)
        shape = (rank, linear.out_features)
        self.block = nn.Parameter(torch.zeros(shape, device=linear.weight.device))

    def delta(self, x: Tensor, y0: Tensor) -> Tensor:
        """``S_r(x) D``, ``S_r(x)[i]`` = the sum of ``x[j]`` over ``j ≡ i (mod r)``, in float32."""
        rank = self.block.shape[0]
        padded = F.pad(x.to(self.block.dtype), (0, -x.shape[-1] % rank))
        folded = padded.reshape(*x.shape[:-1], -1, rank).sum(dim=-2)
        return (folded @ self.block).to(y0.dtype)

    def factors(self) -> tuple[nn.Parameter, ...]:
        """``(D,)``."""
        return (self.block,)


class LoraLinear(AdaptedLinear):
    """LoRA: ``A (r, d_in)`` then ``B (d_out, r)``."""

    def __init__(
        self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__(linear)
        self.scale = scale
        device = linear.weight.device
        down = torch.empty((rank, linear.in_features))
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros((linear.out_features, rank), device=device))

    def delta(self, x: Tensor, y0: Tensor) -> Tensor:
        """``s·(x Aᵀ) Bᵀ``."""
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype)) * self.scale

    def factors(self) -> tuple[nn.Parameter, ...]:
        """``(A, B)``."""
        return (self.down, self.up)


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


def attach(
    model: nn.Module, config: TrainConfig, factors: Mapping[Target, Tensor]
) -> dict[Target, AdaptedLinear]:
    """Freeze the model and put a fresh adapter on the targeted linears, in place.

    Args:
        model: a transformers decoder.
        config: method, rank, scale, targets and seed.
        factors: for lora-xs the basis per target, ``(d_out, ≥ rank)``; else unused.

    Raises:
        OptionRejected: the rank does not fit a target.
        BaseRejected: the model is not a decoder of the expected kind.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    adapted: dict[Target, AdaptedLinear] = {}
    for target, (name, linear) in find_linears(model).items():
        if target.module not in config.targets:
            continue
        limit = min(linear.in_features, linear.out_features)
        if config.method == "lora-xs":
            limit = factors[target].shape[1]
        if config.rank > limit:
            raise OptionRejected("rank", config.rank, f"must not exceed {limit}, as {name} allows")
        wrapped: AdaptedLinear
        if config.method == "lora-xs":
            basis = factors[target][:, : config.rank]
            wrapped = CoreLinear(linear, basis, config.scale, generator)
        elif config.method == "miss":
            wrapped = FoldLinear(linear, config.rank)
        else:
            wrapped = LoraLinear(linear, config.rank, config.scale, generator)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, wrapped)
        adapted[target] = wrapped
    return adapted


def to_weights(
    adapted: Mapping[Target, AdaptedLinear], config: TrainConfig, basis_id: str | None
) -> AdapterWeights:
    """The trained values as a validated adapter on the CPU."""
    return AdapterWeights(
        format=_FORMAT[config.method],
        family=_FAMILY[config.method],
        tensors={
            target: tuple(factor.detach().to("cpu", copy=True) for factor in linear.factors())
            for target, linear in adapted.items()
        },
        scales=dict.fromkeys(adapted, config.scale),
        basis_id=basis_id if config.method == "lora-xs" else None,
    )
