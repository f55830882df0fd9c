"""``FusedForward``: the decoder's step in as few launches as there are; what CUDA runs.

Same weights, cache and results (up to rounding) as ``Decoder.forward``, which is its reference.
Every elementwise part is one kernel of ``shoal.kernels``, and ``core`` adapters are applied inside
those kernels. On CPU tensors the kernels run their references, so that all of this is tested
without a GPU. It owns the order of the launches, nothing else: no buffers, no graphs.

The residual stream stays un-normalised; the factor of an RMS norm is applied to the output of the
GEMM behind it, where that output is read anyway (``RowScale``). So no kernel needs whole rows, and
one launch fewer waits for another. Models with norms on their branches, and float16 (whose range
the un-normalised stream may leave), take the plain way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.spec import GROUPS, MODULES, Group
from shoal.adapters.tables import Made
from shoal.kernels.add_residual.kernel import add_residual
from shoal.kernels.add_rms_norm.kernel import add_rms_norm
from shoal.kernels.core_apply.epilogue import CoreEpilogue, CoreRows, MixedEpilogue, RowScale
from shoal.kernels.core_project.kernel import core_mix, core_project
from shoal.kernels.rope_kv.kernel import rope_kv
from shoal.kernels.rope_kv.reference import rotation_table
from shoal.kernels.silu_mul.kernel import silu_mul
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import KV_LIMIT, Decoder, Layer, Linear
from shoal.server.model.gemms import NO_PLAN, GemmPlan, multiply
from shoal.server.model.kv_cache import KVCache

# Steps of more tokens mix R once per token, in a launch of its own: their elementwise kernels have
# so many column tiles that mixing in each would cost more.
INLINE_TOKENS_MAX = 512
# ``mix_tile`` keeps the whole R of a token in registers.
INLINE_COLUMNS_MAX = 32

Core = CoreEpilogue | MixedEpilogue


class StepParts(Protocol):
    """What a step's adapters are to the forward pass (``shoal.adapters.tables``)."""

    @property
    def core(self) -> CoreRows | None:
        """Adapters on the joint basis, which the fused kernels apply."""
        ...

    @property
    def has_others(self) -> bool:
        """Whether ``before`` and ``apply`` do anything."""
        ...

    def before(self, layer: int, group: Group, x: Tensor) -> Made:
        """What ``apply`` needs of the GEMM's input."""
        ...

    def apply(self, layer: int, group: Group, made: Made, y: Tensor, *, early: bool) -> None:
        """Add all other adapters' deltas to ``y (tokens, n_group)``, in place."""
        ...


# Of a layer and group: the joint basis, (columns, n_group), rank-major.
BasisRows = Callable[[int, Group], Tensor]
# Attention of one layer: (layer, q (tokens, heads, head_dim), scale, window, softcap) ->
# (tokens, heads * head_dim).
Attend = Callable[[int, Tensor, float, int | None, float | None], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """One step's tensors, on the device. Padding tokens have slot -1.

    Attributes:
        input_ids, positions, slot_mapping: ``(tokens,)`` int64.
        attend: attention over the cache, which already holds this step's keys and values.
        parts: the adapters, or None when no token has one.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    attend: Attend
    parts: StepParts | None = None


class FusedForward:
    """Runs steps of one decoder over one cache.

    Args:
        decoder: with ``gemms.SPARE_ROWS`` spare rows where adapters are to be served.
        kv: the cache.
        basis_rows: the joint basis; None serves no fused adapters. Must be None where ``deferred``
            is false: all ``core`` adapters then come through ``StepParts.apply``.
        gemms: how to run each GEMM.
        max_positions: positions are below it.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        *,
        basis_rows: BasisRows | None = None,
        gemms: GemmPlan = NO_PLAN,
        max_positions: int,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.gemms = gemms
        self.basis_rows = basis_rows
        config = decoder.config
        self._layers: list[Layer] = list(decoder.layers)  # type: ignore[arg-type]
        self._norms_after_mlp = [*(layer.attn_norm for layer in self._layers[1:]), decoder.norm]
        # Two of each kind: what the others launch differs in pointers alone, of which those into
        # tables are aligned in every second layer.
        kinds: dict[object, list[int]] = {}
        for index, kind in enumerate(zip(config.windows, config.ropes, strict=True)):
            kinds.setdefault(kind, []).append(index)
        self.kinds_of_layers = sorted(index for same in kinds.values() for index in same[:2])
        self.deferred = defers_norms(config, decoder.dtype)
        positions = torch.arange(max_positions, device=decoder.device)
        self._rotations = {
            rope: rotation_table(frequencies, positions, factor)
            for rope, (frequencies, factor) in decoder.rope_tables.items()
        }
        on_cuda = decoder.device.type == "cuda"
        # Of higher priority: what it runs is short and should get its processors first.
        self._side = (
            torch.cuda.Stream(decoder.device, priority=-1)  # type: ignore[no-untyped-call]
            if on_cuda
            else None
        )

    def __call__(
        self, step: StepInputs, layers: Sequence[int] | None = None
    ) -> tuple[Tensor, RowScale | None]:
        """Run one step, writing its keys and values to the cache.

        Args:
            layers: only these, such as ``kinds_of_layers``: for what the others need, too, to be
                compiled and loaded.

        Returns:
            ``(tokens, hidden)`` behind the final norm, and what is still to be applied to it: the
            factor of each row, or None when there is nothing left to do.
        """
        decoder, config = self.decoder, self.decoder.config
        residual = F.embedding(step.input_ids, decoder.embed)
        if decoder.embedding_scale != 1.0:
            residual *= decoder.embedding_scale
        x, scale = self._enter(residual, self._layers[0].attn_norm.weight)
        for index in range(len(self._layers)) if layers is None else layers:
            layer, rope = self._layers[index], config.ropes[index]
            y, core, early = self._linear(layer.qkv, x, step)
            q = rope_kv(
                y,
                config.num_heads,
                step.positions,
                self._rotations[rope],
                step.slot_mapping,
                self.kv.keys[layer.index],
                self.kv.values[layer.index],
                q_norm=None if layer.q_norm is None else layer.q_norm.weight,
                k_norm=None if layer.k_norm is None else layer.k_norm.weight,
                eps=config.norm_eps,
                bias=layer.qkv.bias,
                kv_limit=KV_LIMIT,
                core=core,
                scale=scale,
                early=early,
            )
            attended = step.attend(
                layer.index, q, config.attention_scale, layer.window, config.attention_softcap
            )
            x, scale = self._add(layer.o, attended, step, residual, layer, after_mlp=False)
            y, core, early = self._linear(layer.gate_up, x, step)
            y = silu_mul(
                y,
                config.intermediate_size,
                activation=config.activation,
                bias=layer.gate_up.bias,
                core=core,
                scale=scale,
                early=early,
            )
            x, scale = self._add(layer.down, y, step, residual, layer, after_mlp=True)
        return x, scale

    def normalised(self, hidden: Tensor, scale: RowScale | None) -> Tensor:
        """``__call__``'s result with the factors applied, in the model's dtype."""
        if scale is None:
            return hidden
        return (hidden.float() * row_factors(scale)[:, None]).to(hidden.dtype)

    def _enter(self, residual: Tensor, weight: Tensor) -> tuple[Tensor, RowScale | None]:
        config = self.decoder.config
        if not self.deferred:
            return add_rms_norm(residual, weight, config.norm_eps), None
        # Not early: what comes before it is a copy of this step's inputs.
        x, sums = add_residual(residual, None, weight, early=False)
        return x, RowScale(sums, config.hidden_size, config.norm_eps)

    def _add(
        self,
        linear: Linear,
        x: Tensor,
        step: StepInputs,
        residual: Tensor,
        layer: Layer,
        *,
        after_mlp: bool,
    ) -> tuple[Tensor, RowScale | None]:
        """``residual += linear(x)``, and the norm that follows."""
        config = self.decoder.config
        if not after_mlp:
            weight, own = layer.mlp_norm.weight, layer.attn_out_norm
        else:
            own = layer.mlp_out_norm
            weight = self._norms_after_mlp[layer.index].weight
        y, core, early = self._linear(linear, x, step)
        if self.deferred:
            x, sums = add_residual(residual, y, weight, bias=linear.bias, core=core, early=early)
            return x, RowScale(sums, config.hidden_size, config.norm_eps)
        assert core is None, "models with normalised branches have no joint basis"
        x = add_rms_norm(
            residual,
            weight,
            config.norm_eps,
            delta=y,
            bias=linear.bias,
            delta_weight=None if own is None else own.weight,
        )
        return x, None

    def _linear(
        self, linear: Linear, x: Tensor, step: StepInputs
    ) -> tuple[Tensor, Core | None, bool]:
        """The GEMM, with every adapter applied but those that the next kernel is to apply.

        Returns:
            ``(tokens, n or more)`` without bias, the adapters that are left, and whether the next
            kernel may begin early (``launching.overlap_options``): not where two streams join.
        """
        parts, group = step.parts, linear.group
        rows = None if parts is None else parts.core
        columns = 0 if rows is None else rows.columns
        tokens, n = len(x), linear.weight.shape[0]
        choice = self.gemms.choose(group, tokens, columns)
        others = parts if parts is not None and parts.has_others else None
        made: Made = () if others is None else others.before(linear.layer, group, x)
        if rows is None:
            y = multiply(x, linear, choice)
            if others is not None:
                others.apply(linear.layer, group, made, y[:, :n], early=True)
            return y, None, True
        assert self.basis_rows is not None
        modules = len(GROUPS[group])
        matrix = linear.layer * len(MODULES) + MODULES.index(GROUPS[group][0])
        basis = self.basis_rows(linear.layer, group)
        core: Core
        if not choice.columns:
            mixed = self._beside(x, linear, rows, matrix)
            y = multiply(x, linear, choice)
            self._join()
            core = MixedEpilogue(mixed, basis)
        else:
            y = multiply(x, linear, choice)
            if mixes_apart(group, tokens, columns):
                core = MixedEpilogue(core_mix(y, n, rows, modules=modules, matrix=matrix), basis)
            else:
                core = CoreEpilogue(rows, basis, h_column=n, matrix=matrix)
        early = bool(choice.columns)
        if others is not None:
            others.apply(linear.layer, group, made, y[:, :n], early=early)
        return y, core, early

    def _beside(self, x: Tensor, linear: Linear, rows: CoreRows, matrix: int) -> Tensor:
        """``u = (x Aᵀ) Rᵀ`` on a side stream, which the GEMM that follows runs beside."""
        a = linear.widened[linear.weight.shape[0] :]
        modules = len(GROUPS[linear.group])
        if self._side is None:
            return core_project(x, a, rows, modules=modules, matrix=matrix, early=False)
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            return core_project(x, a, rows, modules=modules, matrix=matrix, early=False)

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)


def mixes_apart(group: Group, tokens: int, columns: int) -> bool:
    """Whether ``h Rᵀ`` is made once per token in a launch of its own, before the kernel behind
    ``group``'s widened GEMM, and not in every program of that kernel."""
    if tokens > INLINE_TOKENS_MAX or columns > INLINE_COLUMNS_MAX:
        return True
    # Two matrices a token, read by every tile of a wide output: at 256 rows and 32 columns
    # silu_mul takes 26 us inline, 13.8 + 2.7 apart; with 16 columns the ways are equal.
    return group == "gate_up" and columns > 16


def defers_norms(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Whether such a model runs with deferred norms; only then it may have a joint basis."""
    return not config.sandwich_norms and dtype != torch.float16


def row_factors(scale: RowScale) -> Tensor:
    """What each row is still to be multiplied by, ``(tokens,)`` float32."""
    return torch.rsqrt(scale.sums.sum(0) / scale.width + scale.eps)
