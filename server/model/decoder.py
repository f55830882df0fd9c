"""``Decoder``: the base model's forward pass, in one file, configured by ``ModelConfig``.

Inference only: callers hold ``torch.inference_mode()``. Weights of linears that share an input are
fused (q, k, v; gate, up); ``weight_of`` gives the slices. It owns no files (``weights.py``), no
cache (``kv_cache.py``) and no sampling.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.adapters.spec import GROUPS, Group, Target
from shoal.server.model.attention import StepAttention, torch_attention
from shoal.server.model.batch import AppliesAdapters, Batch
from shoal.server.model.config import ModelConfig, ModelError, Rope
from shoal.server.model.kv_cache import KVCache

# Keys and values are clamped to this before they enter the cache. No working model comes near it;
# a row that overflows must not leave infinities behind in a block that another row will pad with.
KV_LIMIT = 1e15


class Decoder(nn.Module):
    """A decoder-only transformer over a paged KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        spare_rows: int = 0,
    ) -> None:
        """Allocate uninitialised weights; ``load_weight`` fills them.

        Args:
            spare_rows: zero rows behind every fused weight, for what is to come out of the same
                GEMM (see ``Linear.widened``).
        """
        super().__init__()
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.embed = _weight(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            Layer(config, i, device, dtype, spare_rows) for i in range(config.num_layers)
        )
        self.norm = Norm(config.hidden_size, config, device)
        tied = config.tie_word_embeddings
        self.head = self.embed if tied else _weight(*self.embed.shape, device=device, dtype=dtype)
        # Rounded to the model's dtype, because the checkpoints were trained that way.
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self._ropes = {rope: rope_frequencies(rope, config.head_dim) for rope in set(config.ropes)}
        self._ropes = {rope: (f.to(device), a) for rope, (f, a) in self._ropes.items()}
        self._views = self._hf_views()

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Run one step, writing the keys and values of its tokens to ``kv``.

        Returns:
            Hidden states after the final norm, ``(tokens, hidden)`` in the model's dtype.
        """
        attend = torch_attention(batch, kv)
        rotations = {rope: _rotation(batch.positions, *f) for rope, f in self._ropes.items()}
        x = F.embedding(batch.input_ids, self.embed)  # (tokens, hidden)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        for layer, rope in zip(self.layers, self.config.ropes, strict=True):
            x = layer(x, rotations[rope], attend, batch.adapters)
        return self.norm(x)  # type: ignore[no-any-return]

    @property
    def rope_tables(self) -> Mapping[Rope, tuple[Tensor, float]]:
        """Each of the model's rotations: angle per position of each pair, factor on cos and sin."""
        return self._ropes

    @property
    def embedding_scale(self) -> float:
        """What the looked-up embeddings are multiplied by, rounded to the model's dtype."""
        return self._embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of chosen rows of ``forward``'s result: ``(n, vocab)`` float32."""
        logits = F.linear(hidden, self.head).float()
        cap = self.config.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def weight_of(self, target: Target) -> Tensor:
        """The base weight ``(d_out, d_in)`` of an adaptable linear, in Hugging Face's row order.

        It is a view of what the model runs with: callers must not write to it.
        """
        part = "mlp" if target.module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        return self._views[f"model.layers.{target.layer}.{part}.{target.module}.weight"]

    def weight_shapes(self) -> Mapping[str, torch.Size]:
        """Every tensor the model needs, by Hugging Face name."""
        return {name: view.shape for name, view in self._views.items()}

    def load_weight(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor, converting dtype and device.

        Raises:
            ModelError: the shape does not fit; the message names the tensor and both shapes.
            KeyError: the model has no tensor of this name.
        """
        view = self._views[name]
        if view.shape != tensor.shape:
            raise ModelError(
                f"tensor {name} has shape {tuple(tensor.shape)}, the config asks for "
                f"{tuple(view.shape)}"
            )
        with torch.no_grad():
            view.copy_(tensor)
            if self.config.norm_plus_one and name.endswith("norm.weight"):
                view.add_(1.0)  # norms are float32 here, so nothing is lost

    def _hf_views(self) -> dict[str, Tensor]:
        """Hugging Face's names -> views into the fused weights."""
        views: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embed.data,
            "model.norm.weight": self.norm.weight.data,
        }
        if not self.config.tie_word_embeddings:
            views["lm_head.weight"] = self.head.data
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            views |= {f"model.layers.{index}.{n}": view for n, view in layer.hf_views().items()}
        return views


class Layer(nn.Module):
    def __init__(
        self,
        c: ModelConfig,
        index: int,
        device: torch.device | str,
        dtype: torch.dtype,
        spare_rows: int,
    ) -> None:
        super().__init__()
        self.config = c
        self.index = index
        self.window = c.windows[index]
        self.kv_limit = min(KV_LIMIT, torch.finfo(dtype).max)
        linear = partial(Linear, layer=index, device=device, dtype=dtype, spare_rows=spare_rows)
        hidden, inner, qkv = c.hidden_size, c.intermediate_size, c.q_size + 2 * c.kv_size
        self.qkv = linear("qkv", hidden, qkv, c.qkv_bias)
        self.o = linear("o", c.q_size, hidden, c.o_bias)
        self.gate_up = linear("gate_up", hidden, 2 * inner, c.mlp_bias)
        self.down = linear("down", inner, hidden, c.mlp_bias)
        self.attn_norm = Norm(hidden, c, device)
        self.mlp_norm = Norm(hidden, c, device)
        self.attn_out_norm = Norm(hidden, c, device) if c.sandwich_norms else None
        self.mlp_out_norm = Norm(hidden, c, device) if c.sandwich_norms else None
        self.q_norm = Norm(c.head_dim, c, device) if c.qk_norm else None
        self.k_norm = Norm(c.head_dim, c, device) if c.qk_norm else None

    def forward(
        self,
        x: Tensor,  # (tokens, hidden)
        rotation: tuple[Tensor, Tensor],
        attend: StepAttention,
        adapters: AppliesAdapters | None,
    ) -> Tensor:
        y = self._attention(self.attn_norm(x), rotation, attend, adapters)
        x = x + (self.attn_out_norm(y) if self.attn_out_norm else y)
        y = self._mlp(self.mlp_norm(x), adapters)
        return x + (self.mlp_out_norm(y) if self.mlp_out_norm else y)

    def _attention(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: StepAttention,
        adapters: AppliesAdapters | None,
    ) -> Tensor:
        c = self.config
        qkv = self.qkv(x, adapters)  # (tokens, q_size + 2 * kv_size)
        kv_part = qkv[:, c.q_size :]
        limit = self.kv_limit
        kv_part.nan_to_num_(0.0, limit, -limit).clamp_(-limit, limit)
        heads = qkv.view(len(x), -1, c.head_dim)  # (tokens, heads + 2 * kv_heads, head_dim)
        q, k, v = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation)
        else:
            qk = rotate(heads[:, : c.num_heads + c.num_kv_heads], *rotation)
            q, k = torch.split(qk, [c.num_heads, c.num_kv_heads], dim=1)
        out = attend(
            self.index,
            q,
            k,
            v,
            scale=c.attention_scale,
            window=self.window,
            softcap=c.attention_softcap,
        )
        return self.o(out, adapters)  # type: ignore[no-any-return]

    def _mlp(self, x: Tensor, adapters: AppliesAdapters | None) -> Tensor:
        gate, up = self.gate_up(x, adapters).chunk(2, dim=-1)  # 2 x (tokens, intermediate)
        if self.config.activation == "silu":
            gate = F.silu(gate)
        else:
            gate = F.gelu(
                gate, approximate="tanh" if self.config.activation == "gelu_tanh" else "none"
            )
        return self.down(gate * up, adapters)  # type: ignore[no-any-return]

    def hf_views(self) -> dict[str, Tensor]:
        """Hugging Face's names below ``model.layers.N`` -> views into this layer's weights."""
        c = self.config
        sizes = {
            "qkv": [c.q_size, c.kv_size, c.kv_size],
            "gate_up": [c.intermediate_size, c.intermediate_size],
        }
        views: dict[str, Tensor] = {}
        for linear in (self.qkv, self.o, self.gate_up, self.down):
            modules = GROUPS[linear.group]
            part = "self_attn" if linear.group in ("qkv", "o") else "mlp"
            for kind, fused in (("weight", linear.weight), ("bias", linear.bias)):
                if fused is None:
                    continue
                pieces = torch.split(fused.data, sizes.get(linear.group, [fused.shape[0]]))
                for module, piece in zip(modules, pieces, strict=True):
                    views[f"{part}.{module}.{kind}"] = piece
        sandwich = c.sandwich_norms
        before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        norms = {
            "input_layernorm": self.attn_norm,
            before_mlp: self.mlp_norm,
            "self_attn.q_norm": self.q_norm,
            "self_attn.k_norm": self.k_norm,
        }
        if sandwich:
            norms["post_attention_layernorm"] = self.attn_out_norm
            norms["post_feedforward_layernorm"] = self.mlp_out_norm
        for name, norm in norms.items():
            if norm is not None:
                views[f"{name}.weight"] = norm.weight.data
        return views


class Linear(nn.Module):
    """A fused linear with the place where adapters add their deltas.

    Attributes:
        weight: ``(d_out, d_in)``.
        widened: ``(d_out + spare_rows, d_in)``, whose first rows are ``weight``. The spare ones are
            zero until somebody writes to them.
    """

    def __init__(
        self,
        group: Group,
        d_in: int,
        d_out: int,
        bias: bool,
        *,
        layer: int,
        device: torch.device | str,
        dtype: torch.dtype,
        spare_rows: int,
    ) -> None:
        super().__init__()
        self.group = group
        self.layer = layer
        self.widened = torch.empty(d_out + spare_rows, d_in, device=device, dtype=dtype)
        self.widened[d_out:].zero_()
        self.weight = nn.Parameter(self.widened[:d_out], requires_grad=False)
        self.bias = _weight(d_out, device=device, dtype=dtype) if bias else None

    def forward(self, x: Tensor, adapters: AppliesAdapters | None) -> Tensor:
        if adapters is None:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight)
        adapters.apply(
            self.layer, self.group, x, y
        )  # before the bias: adapters are defined on x Wᵀ
        return y if self.bias is None else y.add_(self.bias)


class Norm(nn.Module):
    """RMSNorm over the last dimension, computed and weighted in float32.

    The weight is float32 and already contains the ``1 +`` of Gemma's norms.
    """

    def __init__(self, size: int, config: ModelConfig, device: torch.device | str) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = _weight(size, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair ``(head_dim / 2,)`` float32, and the factor on cos and sin.

    ``llama3`` follows the Llama 3.1 release; ``yarn`` is arXiv:2309.00071, section 3.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    freq = 1.0 / rope.theta**pairs
    if rope.divisors:
        freq = freq / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.kind == "linear":
        freq = freq / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_context * freq / (2 * math.pi)  # rotations within the old context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: stretched
        freq = keep * freq + (1 - keep) * freq / rope.factor
    elif rope.kind == "yarn":
        low, high = (
            _yarn_pair(rope, rotations, head_dim) for rotations in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        stretched = ramp.clamp(0, 1)
        freq = (1 - stretched) * freq + stretched * freq / rope.factor
    return freq, rope.attention_factor


def _yarn_pair(rope: Rope, rotations: float, head_dim: int) -> float:
    """The (fractional) pair that turns ``rotations`` times within the original context."""
    wavelength = rope.original_context / (rotations * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))


def _rotation(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin of a step's positions, each ``(tokens, 1, head_dim / 2)`` float32."""
    angles = positions.float()[:, None, None] * frequencies
    # Not angles.cos(): on a CPU that goes through MKL, whose threads take 10 ms to wake up beside
    # torch's own, and this is once in every step.
    turned = torch.view_as_real(torch.polar(torch.full_like(angles, factor), angles))
    return turned[..., 0].contiguous(), turned[..., 1].contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x (tokens, heads, head_dim)``; the pairs are ``(i, i + head_dim / 2)``."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _weight(*shape: int, device: torch.device | str, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
