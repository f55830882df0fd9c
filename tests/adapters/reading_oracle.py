"""What a file means, read a second time: ``ΔW`` of every module from its config and its tensors.

Written from `PEFT`'s source and the papers, in float64, without any of the code under test. It
trusts that the file is valid: it is asked only about files that the reader has accepted.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shoal.adapters.spec import Target

Config = Mapping[str, Any]
Parts = Mapping[str, Tensor]
_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")

# Set, each of these makes an adapter more than a change of the seven linears by ΔW.
_MORE = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters",
    "fan_in_fan_out",
)  # fmt: skip
_MORE_OF_LORA = (
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config",
    "monteclora_config", "arrow_config",
)  # fmt: skip


class World(NamedTuple):
    """The base: ``W`` by target, and what formats without factors of their own refer to.

    Attributes:
        weights: ``(d_out, d_in)`` float64.
        basis_of: ``B (d_out, k)`` of compact LoRA-XS, by the id in its config.
        singular: ``U, σ, V`` that SVF and SVFT mean.
    """

    weights: Mapping[Target, Tensor]
    basis_of: Callable[[str, Target], Tensor]
    singular: Callable[[Target], tuple[Tensor, Tensor, Tensor]]


class Change(NamedTuple):
    """``ΔW``, and how large the numbers are that it was made of: rounding is relative to them."""

    delta: Tensor
    size: float


def must_be_refused(config: Config) -> str | None:
    """A field that makes the file mean more than ``ΔW``, or None."""
    if config.get("bias") not in (None, "none"):
        return "bias"
    lora_like = config.get("peft_type") in ("LORA", "ADALORA", "LORA_XS")
    names = (*_MORE, *_MORE_OF_LORA) if lora_like else _MORE
    return next((name for name in names if config.get(name)), None)


def changes(config: Config, tensors: Mapping[str, Tensor], world: World) -> dict[Target, Change]:
    """``ΔW`` of every module that has tensors and a rank above zero."""
    modules: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = name.removesuffix(".weight").removeprefix("base_model.")
        if not key.startswith("model."):
            shared[key] = tensor
            continue
        key = re.sub(r"(\.default)?_lora_latent_mapping$", ".latent", key.removeprefix("model."))
        path, _, kind = key.rpartition(".")
        modules.setdefault(path, {})[kind] = tensor
    found: dict[Target, Change] = {}
    order = sorted(modules, key=_position)
    for index, path in enumerate(order):
        layer, module = _MODULE.fullmatch(path).groups()  # type: ignore[union-attr]
        target = Target(int(layer), module)
        parts = {k: t if t.dtype == torch.int32 else t.double() for k, t in modules[path].items()}
        rows = {t.shape[0] for k, t in parts.items() if k in ("lora_A", "lora_E")}
        if rows == {0}:
            continue
        read = _FORMATS[config["peft_type"]]
        context = _Context(config, path, target, world, shared, index, order, modules[path])
        found[target] = read(parts, context)
    return found


class _Context(NamedTuple):
    config: Config
    path: str
    target: Target
    world: World
    shared: Mapping[str, Tensor]
    index: int
    order: list[str]
    raw: Parts

    @property
    def count(self) -> int:
        return len(self.order)

    @property
    def w(self) -> Tensor:
        return self.world.weights[self.target]


def _position(path: str) -> tuple[int, int]:
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    match = _MODULE.fullmatch(path)
    assert match is not None, path
    return int(match[1]), order.index(match[2])


def scale_of(config: Config, path: str, rank: int, alpha_name: str = "lora_alpha") -> float:
    """PEFT's: the first matching key of ``alpha_pattern``, else the field; over r or its root."""
    patterns = config.get("alpha_pattern") or {}
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            alpha = value
            break
    else:
        alpha = config.get(alpha_name, 8)
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _product(s: float, *factors: Tensor) -> Change:
    product = factors[0]
    for factor in factors[1:]:
        product = product @ factor
    size = abs(s)
    for factor in factors:
        size *= float(factor.norm())
    return Change(s * product, size)


def _lora(parts: Parts, c: _Context) -> Change:
    a, b = parts["lora_A"], parts["lora_B"]
    s = scale_of(c.config, c.path, a.shape[0])
    if "latent" in parts:
        return _product(s, b, parts["latent"], a)
    change = _product(s, b, a)
    removed = _removed(c, a.shape[0], s)
    delta, size = change.delta - removed, change.size + float(removed.norm())
    magnitude = parts.get("lora_magnitude_vector")
    assert (magnitude is not None) == bool(c.config.get("use_dora", False)), "DoRA or not?"
    if magnitude is None:
        return Change(delta, size)
    whole = c.w + delta
    g = (magnitude / whole.norm(dim=1))[:, None]
    # Both the file's m and the norms are exact here; the reader rounds g to float32.
    return Change(g * whole - c.w, float(g.abs().max()) * (size + float(c.w.norm())))


def _removed(c: _Context, rank: int, s: float) -> Tensor:
    """What PiSSA, OLoRA or MiLoRA took out of ``W`` before training."""
    told = c.config.get("base_correction") or {}
    init = c.config.get("init_lora_weights")
    method = told.get("method") or (init if init in ("pissa", "olora") else None)
    rank = told.get("r") or rank
    if method == "olora":
        q, r = torch.linalg.qr(c.w)
        return s * q[:, :rank] @ r[:rank]
    u, sigma, vt = torch.linalg.svd(c.w, full_matrices=False)
    if method == "pissa":
        return u[:, :rank] @ torch.diag(sigma[:rank]) @ vt[:rank]
    if method == "milora":
        return u[:, -rank:] @ torch.diag(sigma[-rank:]) @ vt[-rank:]
    assert init in (None, True, False, "gaussian", "orthogonal", "eva", "mica"), init
    return torch.zeros_like(c.w)


def _compact(parts: Parts, c: _Context) -> Change:
    r = parts["lora_latent_mapping"]
    told = c.config.get("r", 8)
    s = c.config.get("lora_alpha", 8) / (math.sqrt(told) if c.config.get("use_rslora") else told)
    b = c.world.basis_of(c.config["basis"]["id"], c.target)[:, : len(r)]
    return _product(s, b, r, b.T @ c.w)


def _adalora(parts: Parts, c: _Context) -> Change:
    e, init_r = parts["lora_E"], c.config.get("init_r", 12)
    alpha = c.config.get("lora_alpha", 8)
    if alpha <= 0:
        masks = c.config.get("rank_pattern") or {}
        alpha = len(e) if isinstance(masks.get(f"{c.path}.lora_E"), list) else init_r
    return _product(alpha / (init_r + 1e-5), parts["lora_B"] * e.T, parts["lora_A"])


def _vera(parts: Parts, c: _Context) -> Change:
    d_out, d_in = c.w.shape
    if "vera_A" in c.shared:
        a, b = c.shared["vera_A"].double(), c.shared["vera_B"].double()
    else:
        shapes = [c.world.weights[_target(path)].shape for path in c.order]
        generator = torch.Generator().manual_seed(c.config.get("projection_prng_key", 0))
        a, b = (
            torch.empty(size).uniform_(-bound, bound, generator=generator).double()
            for size in (
                (c.config.get("r", 256), max(shape[1] for shape in shapes)),
                (max(shape[0] for shape in shapes), c.config.get("r", 256)),
            )
            for bound in [math.sqrt(3) * math.sqrt(2) / math.sqrt(size[1])]
        )
    left = torch.diag(parts["vera_lambda_b"]) @ b[:d_out]
    return _product(1.0, left, torch.diag(parts["vera_lambda_d"]), a[:, :d_in])


def _target(path: str) -> Target:
    layer, module = _MODULE.fullmatch(path).groups()  # type: ignore[union-attr]
    return Target(int(layer), module)


def _tinylora(parts: Parts, c: _Context) -> Change:
    a, b, p = parts["tinylora_A"], parts["tinylora_B"], parts.get("tinylora_P")
    if p is None:
        seed = c.config.get("projection_seed", 42) + c.index
        size = (c.config.get("u", 64), len(a), len(a))
        generator = torch.Generator().manual_seed(seed)
        p = torch.normal(0.0, 1 / math.sqrt(len(a)), size, generator=generator).double()
    groups = max(1, round(c.count * (1.0 - c.config.get("weight_tying", 0.0))))
    group = min(c.index // max(1, c.count // groups), groups - 1)
    v = c.shared[f"tinylora_v.{group}"].double()
    r = (v[:, None, None] * p).sum(0)
    size = float(b.norm() * a.norm() * (v[:, None, None] * p).norm())
    return Change(b @ r @ a, size)


def _miss(parts: Parts, c: _Context) -> Change:
    (d,) = parts.values()
    rank = d.shape[0]
    d_out, d_in = c.w.shape
    if c.config.get("shard") == "output":
        long = d_out % rank
        sizes = [d_out // rank + (i < long) for i in range(rank)]
        rows = [i for i, size in enumerate(sizes) for _ in range(size)]
        return Change(d[rows], float(d.norm()))
    columns = [o % d.shape[1] for o in range(d_out)]
    delta = torch.stack([d[j % rank, columns] for j in range(d_in)], dim=1)
    return Change(delta, float(d.norm()))


def _loha(parts: Parts, c: _Context) -> Change:
    rank = parts["hada_w1_b"].shape[0]
    s = scale_of({**c.config, "use_rslora": False}, c.path, rank, "alpha")
    one = parts["hada_w1_a"] @ parts["hada_w1_b"]
    two = parts["hada_w2_a"] @ parts["hada_w2_b"]
    size = abs(s) * math.prod(float(part.norm()) for part in parts.values())
    return Change(s * one * two, size)


def _lokr(parts: Parts, c: _Context) -> Change:
    rank, sides, size = None, [], 1.0
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            sides.append(parts[side])
            size *= float(parts[side].norm())
        else:
            left, right = parts[f"{side}_a"], parts[f"{side}_b"]
            rank = left.shape[1]
            sides.append(left @ right)
            size *= float(left.norm() * right.norm())
    if rank is None:
        ranks = c.config.get("rank_pattern") or {}
        keys = [key for key in ranks if re.match(rf"(.*\.)?({key})$", c.path)]
        rank = ranks[keys[0]] if keys else c.config.get("r", 8)
    s = scale_of({**c.config, "use_rslora": False}, c.path, rank, "alpha")
    return Change(s * torch.kron(*sides), abs(s) * size)


def _svf(parts: Parts, c: _Context) -> Change:
    u, sigma, v = c.world.singular(c.target)
    z = c.raw["svf_vector"]  # the authors' sigmoid is of the file's own dtype
    if c.config.get("vector", "logits") == "logits":
        z = torch.sigmoid(z) * c.config.get("max_mult", 1.0)
    z = z.double()
    wanted = sigma * z
    if c.config.get("renormalise", True):
        wanted = wanted * (sigma.sum() / wanted.sum())
    return Change(u @ torch.diag(wanted - sigma) @ v.T, float(wanted.norm() + sigma.norm()))


def _svft(parts: Parts, c: _Context) -> Change:
    u, sigma, v = c.world.singular(c.target)
    m = torch.zeros(len(sigma), len(sigma), dtype=torch.float64)
    gate = parts.get("svft_gate")
    values = parts["svft_values"] * (1.0 if gate is None else torch.sigmoid(gate))
    rows, columns = parts["svft_rows"].tolist(), parts["svft_cols"].tolist()
    for row, column, value in zip(rows, columns, values, strict=True):
        m[row, column] += value
    s_pre = parts.get("svft_s_pre", sigma)
    m[range(len(s_pre)), range(len(s_pre))] += s_pre
    size = float(values.abs().sum() + s_pre.norm() + sigma.norm())
    return Change(u @ (m - torch.diag(sigma)) @ v.T, size)


_FORMATS: Mapping[str, Callable[[Parts, _Context], Change]] = {
    "LORA": _lora,
    "LORA_XS": _compact,
    "ADALORA": _adalora,
    "VERA": _vera,
    "TINYLORA": _tinylora,
    "MISS": _miss,
    "BONE": _miss,
    "LOHA": _loha,
    "LOKR": _lokr,
    "SVF": _svf,
    "SVFT": _svft,
}
