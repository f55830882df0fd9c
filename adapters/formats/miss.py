"""PEFT's MiSS, and Bone, its earlier name, and the form that the MiSS paper starts from. Scale 1.

One tensor per module, ``miss_block`` (or ``bone_block``):

- default: ``D (r, d_out)``, any ``r ≤ d_in``, dividing it or not: ``ΔW[o, j] = D[j mod r, o]``;
- ``mini``: ``(r, m)`` with ``m`` dividing ``d_out``; output ``o`` uses column ``o mod m``, so ``D``
  is it, tiled;
- ``shard: "output"`` in the config: ``D (r, d_in)``, ``ΔW[o] = D[i]`` for every output ``o`` of
  shard ``i``. The outputs are cut into ``r`` runs as equal as can be, the longer ones first;
- ``bat``: ``(d_out/r, r, r)``, which multiplies the base weight and is refused.

The first two are ``fold``. The third repeats rows, not columns: ``ΔW = P D`` with the 0/1 matrix
``P (d_out, r)`` of which output is in which shard, so it is ``lora`` with ``A = D``, ``B = P``.

Source: PEFT 0.14 to 0.21, ``tuners/miss`` and ``tuners/bone``; the output shards: equation 3 of
"MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure" (arXiv
2409.15371), which leaves the shards' sizes open. PEFT has no such mode, so the field is ours.
"""

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import Config, check_common, field, get_rank
from shoal.adapters.formats.keys import NamedTensor
from shoal.adapters.spec import Dims, Family, Target
from shoal.adapters.weights import AdapterWeights

_BAT = (
    "bat multiplies the base weights and cannot share a batch; merge it into a base with "
    "`shoal adapters convert --merge`"
)


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    by_output = _by_output(raw.config)
    mini_r = _mini_r(raw.config)
    if by_output and mini_r is not None:
        raise AdapterRejected(field("init_weights"), "mini has no output shards; must be true")
    rank = get_rank(raw.config, "r", 64)
    kind = "bone_block" if raw.config["peft_type"] == "BONE" else "miss_block"
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    num_bytes = 0
    for target in raw.targets:
        other = next(iter(raw.targets[target].values()))
        if kind not in raw.targets[target] or len(raw.targets[target]) != 1:
            raise AdapterRejected(
                other.name, f"peft_type {raw.config['peft_type']} holds one {kind} per module"
            )
        dims = context.shape.dims[target.module]
        # A few bytes of `mini`, and 0/1 factors, can stand for a tensor as large as the base's.
        elements = rank * (sum(dims) if by_output else dims.d_out)
        num_bytes += elements * other.tensor.dtype.itemsize
        if num_bytes > context.max_bytes:
            raise AdapterTooLarge(f"{other.name}: exceeds {context.max_bytes} bytes once expanded")
        named = raw.part(target, kind)
        if by_output:
            tensors[target] = _shards(named, rank, dims)
        else:
            tensors[target] = (_columns(named, rank, mini_r, dims),)
    family: Family = "lora" if by_output else "fold"
    return AdapterWeights("miss", family, tensors, dict.fromkeys(tensors, 1.0))


def _by_output(config: Config) -> bool:
    """Whether the file is of the paper's form, whose shards are of outputs."""
    shard = config.get("shard")
    if shard is None or (shard in ("input", "output") and config["peft_type"] == "MISS"):
        return bool(shard == "output")
    raise AdapterRejected(field("shard"), "must be input or output, and only of peft_type MISS")


def _mini_r(config: Config) -> int | None:
    """Columns of ``mini``, None for the default mode."""
    mode = config.get("init_weights", True)
    if mode == "bat":
        raise AdapterRejected(field("init_weights"), _BAT)
    if mode == "mini" and config["peft_type"] == "MISS":
        return get_rank(config, "mini_r", 1)
    if mode is None or isinstance(mode, bool):
        return None
    raise AdapterRejected(field("init_weights"), "must be true, false or, for MISS, mini")


def _columns(named: NamedTensor, rank: int, mini_r: int | None, dims: Dims) -> Tensor:
    """``D (r, d_out)`` from the stored block."""
    if named.tensor.ndim == 3:
        raise AdapterRejected(named.name, _BAT)
    if rank > dims.d_in:
        raise AdapterRejected(named.name, f"r is {rank}, must be at most d_in {dims.d_in}")
    if mini_r is None:
        return check_shape(named, rank, dims.d_out)
    if dims.d_out % mini_r:
        raise AdapterRejected(
            named.name, f"mini_r {mini_r} must divide the module's {dims.d_out} outputs"
        )
    return check_shape(named, rank, mini_r).repeat(1, dims.d_out // mini_r)


def _shards(named: NamedTensor, rank: int, dims: Dims) -> tuple[Tensor, Tensor]:
    """``A = D (r, d_in)`` and ``B (d_out, r)``, one where an output is of a shard."""
    if named.tensor.ndim == 3:
        raise AdapterRejected(named.name, _BAT)
    if rank > dims.d_out:
        raise AdapterRejected(named.name, f"r is {rank}, must be at most d_out {dims.d_out}")
    d = check_shape(named, rank, dims.d_in)
    size, longer = divmod(dims.d_out, rank)
    sizes = torch.full((rank,), size)
    sizes[:longer] += 1
    shard_of = torch.arange(rank).repeat_interleave(sizes)
    return d, torch.nn.functional.one_hot(shard_of, rank).to(d.dtype)


FORMAT = Format(
    name="miss",
    markers=frozenset({"miss_block", "bone_block"}),
    kinds=frozenset({"miss_block", "bone_block"}),
    peft_types=frozenset({"MISS", "BONE"}),
    read=_read,
)
