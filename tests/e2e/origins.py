"""Adapters of every family as their origins write them, and the model that each origin makes of it.

PEFT makes what it has, with random numbers where training would have left its own, and computes
with its own modules. For the rest the papers' formulas, in float64, say what the weights become.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# (the base, an empty folder for the adapter, what the file's tensors are rounded to) -> the model
Make = Callable[["Base", Path, torch.dtype | None], nn.Module]


class Base:
    """A base as transformers has it.

    Attributes:
        path: what the server loads.
        make_adapter: the fixture, for what is written without PEFT.
        layers: those that adapters change; None for all.
    """

    def __init__(
        self,
        model: Any,
        path: Path,
        make_adapter: Callable[..., Any],
        layers: Sequence[int] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.path = path
        self.make_adapter = make_adapter
        self.layers = None if layers is None else list(layers)

    def fresh(self) -> Any:
        """A copy; where there are ``layers``, of these only, and all else is shared."""
        shared = {} if self.layers is None else dict(self.model.named_parameters())
        for layer in self.layers or ():
            for name in [name for name in shared if f".layers.{layer}." in name]:
                del shared[name]
        return copy.deepcopy(self.model, {id(weight): weight for weight in shared.values()})

    def weight(self, module: str) -> Tensor:
        return self.model.get_submodule(module).weight.detach().double()

    def modules(self) -> list[str]:
        """Every linear that adapters may change, in the model's order."""
        inside = [f".layers.{layer}." for layer in self.layers or ()] or [".layers."]
        return [
            name
            for name, _ in self.model.named_modules()
            if name.endswith(MODULES) and any(part in name for part in inside)
        ]

    def merged(self, deltas: Mapping[str, Tensor]) -> Any:
        """The model with deltas added to its weights: in float64, or rounded if it is shared."""
        model = self.fresh()
        if self.layers is None:
            model.double()
        for module, delta in deltas.items():
            model.get_submodule(module).weight.copy_(self.weight(module) + delta)
        return model

    @torch.inference_mode()
    def logits(self, model: Any, sequences: Tensor) -> Tensor:
        """``(sequences, positions, vocab)`` float64; computed in float64 if nothing is shared."""
        if self.layers is None:
            model = model.double()
        logits: Tensor = model(sequences).logits.double()
        return logits


@dataclass(frozen=True)
class Case:
    """An adapter.

    Attributes:
        name: of the adapter.
        served: the format that reads it and the family that serves it.
        make: see ``Make``; the files are what a user would upload.
        explicit: whether a file in 16 bits is served as ``lora``, because its ``A`` is no longer
            what ``B`` and the base make it.
    """

    name: str
    served: tuple[str, str]
    make: Make
    explicit: bool = False


# ------------------------------------------------------------------------------------ what PEFT has


def peft(
    kind: Callable[..., Any],
    *,
    noise: float = 0.1,
    modules: Sequence[str] = MODULES,
    layers: Sequence[int] | None = None,
    reload: bool = False,
    prepare: Callable[[Any], None] = lambda model: None,
    **config: Any,
) -> Make:
    """An adapter as PEFT makes, moves and saves it.

    Args:
        kind: PEFT's class of config, made of ``config``.
        noise: what is trained moves by this much.
        reload: whether what counts is what PEFT makes of its files. Always so where the tensors
            are rounded, which happens to the files.
        prepare: does something to the model before it is saved.
    """

    def make(base: Base, folder: Path, dtype: torch.dtype | None) -> nn.Module:
        where = base.layers if layers is None else list(layers)
        torch.manual_seed(len(modules))
        model = get_peft_model(
            base.fresh(),
            kind(
                target_modules=list(modules),
                layers_to_transform=where,
                task_type="CAUSAL_LM",
                **config,
            ),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += noise * torch.randn_like(parameter)
        prepare(model)
        model.eval().save_pretrained(folder)
        if dtype is not None:
            rounded(folder, dtype)
        if reload or dtype is not None:
            model = PeftModel.from_pretrained(base.fresh(), folder).eval()
        return model

    return make


def rounded(folder: Path, dtype: torch.dtype) -> None:
    """Round a file's tensors."""
    tensors = load_file(folder / TENSORS)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / TENSORS)


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of a config."""
    told = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(told | fields))


def allocate(model: Any) -> None:
    """What AdaLoRA's allocator may have left: nothing of a module, one rank of another."""
    config = model.peft_config["default"]
    names = [name for name, _ in model.named_parameters() if "lora_E" in name]
    paths = [name.removeprefix("base_model.model.").removesuffix(".default") for name in names]
    ranks = range(config.init_r)
    config.rank_pattern = {
        path: [rank < kept for rank in ranks]
        for path, kept in zip(paths, [0, 1, *[config.init_r - 1] * len(paths)], strict=False)
    }


def train_fa(model: Any) -> None:
    """Some steps of LoRA-FA."""
    config = model.peft_config["default"]
    optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=0.1)
    tokens = torch.arange(9)[None]
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def bone(make: Make) -> Make:
    """MiSS under its earlier names, as PEFT 0.14 to 0.18 saved it."""

    def renamed(base: Base, folder: Path, dtype: torch.dtype | None) -> nn.Module:
        model = make(base, folder, dtype)
        edit(folder, peft_type="BONE")
        tensors = load_file(folder / TENSORS)
        save_file({n.replace(".miss_", ".bone_"): t for n, t in tensors.items()}, folder / TENSORS)
        return model

    return renamed


def converted(base: Base, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """PiSSA that PEFT has converted to plain LoRA of twice the rank."""
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        init_lora_weights="pissa",
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=base.layers,
    )
    torch.manual_seed(2)
    model = get_peft_model(base.fresh(), config)
    # Only what is loaded again as it was at first can be taken away from what was trained.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval()
    initial = str(folder / "initial")
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial)
    shutil.rmtree(folder / "initial")
    if dtype is not None:
        rounded(folder, dtype)
        return PeftModel.from_pretrained(base.fresh(), folder).eval()
    return model


# ------------------------------------------------------------------------------- from the formulas


def residual(method: str, rank: int, modules: Sequence[str]) -> Make:
    """LoRA trained on ``W - B0 A0``: its authors' scripts say nothing, so the config has to.

    MiLoRA takes the last components of W's SVD, PiSSA the first: ``B0 = U √σ``, ``A0 = √σ Vᵀ``.
    """

    def make(base: Base, folder: Path, dtype: torch.dtype | None) -> nn.Module:
        rng = torch.Generator().manual_seed(rank)
        tensors, deltas = {}, {}
        for module in _chosen(base, modules):
            u, sigma, vt = torch.linalg.svd(base.weight(module), full_matrices=False)
            part = slice(-rank, None) if method == "milora" else slice(None, rank)
            b0, a0 = u[:, part] * sigma[part].sqrt(), sigma[part].sqrt()[:, None] * vt[part]
            a, b = (
                _stored(first + 0.2 * torch.randn(first.shape, generator=rng), dtype)
                for first in (a0, b0)
            )
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
            deltas[module] = b.double() @ a.double() - b0 @ a0
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "init_lora_weights": True}
        told = {"base_correction": {"method": method, "r": rank}}
        _write(folder, config | told | {"target_modules": list(modules)}, tensors)
        return base.merged(deltas)

    return make


def shards(rank: int, modules: Sequence[str], strength: float) -> Make:
    """MiSS by its paper's equation 3: row ``i`` of D for every output of shard ``i``."""

    def make(base: Base, folder: Path, dtype: torch.dtype | None) -> nn.Module:
        rng = torch.Generator().manual_seed(rank)
        tensors, deltas = {}, {}
        for module in _chosen(base, modules):
            d_out, d_in = base.weight(module).shape
            d = _stored(strength * torch.randn(rank, d_in, generator=rng), dtype)
            tensors[f"{module}.miss_block"] = d
            sizes = [len(part) for part in torch.arange(d_out).tensor_split(len(d))]
            deltas[module] = d.double().repeat_interleave(torch.tensor(sizes), 0)
        config = {"peft_type": "MISS", "r": rank, "init_weights": True, "shard": "output"}
        _write(folder, config | {"target_modules": list(modules)}, tensors)
        return base.merged(deltas)

    return make


def _chosen(base: Base, modules: Sequence[str]) -> list[str]:
    return [module for module in base.modules() if module.endswith(tuple(modules))]


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype or torch.float32).contiguous()


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    (folder / CONFIG).write_text(json.dumps(dict(config)))
    save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / TENSORS)


def drawn(
    kind: str, rank: int, *, modules: Sequence[str] = MODULES, partial: bool = False, **options: Any
) -> Make:
    """One of the fixture's kinds.

    Args:
        partial: only on layer 1.
        options: the fixture's.
    """

    def make(base: Base, folder: Path, dtype: torch.dtype | None) -> nn.Module:
        adapter = base.make_adapter(
            kind,
            rank,
            rank,
            base=base,
            modules=lambda m: m.endswith(tuple(modules)) and not (partial and ".1." not in m),
            dtype=dtype or torch.float32,
            **options,
        )
        for name, path in adapter.files.items():
            shutil.copy(path, folder / name)
        return base.merged(adapter.deltas)

    return make


ATTENTION, MLP = MODULES[:4], MODULES[4:]
XS, LORA, FOLD, SPECTRAL = ("lora_xs", "core"), ("lora", "lora"), ("miss", "fold"), "spectral"

CASES: tuple[Case, ...] = (
    Case("lora", LORA, peft(LoraConfig, r=1, lora_alpha=2, noise=0.3)),
    Case("lora-64", LORA, peft(LoraConfig, r=64, lora_alpha=16, modules=["q_proj", "down_proj"])),
    Case("lora-33", LORA, peft(LoraConfig, r=33, lora_alpha=20, layers=[1])),
    Case("rslora", LORA, peft(LoraConfig, r=2, lora_alpha=2, use_rslora=True)),
    Case(
        "patterns",
        LORA,
        peft(
            LoraConfig,
            r=3,
            rank_pattern={"layers.1.self_attn.q_proj": 2, r"^model\.layers\.1\.mlp\..*_proj": 7},
            alpha_pattern={"k_proj": 5, "model.layers.[01].mlp.down_proj": 1.5},
        ),
    ),
    Case("lora-fa", LORA, peft(LoraConfig, r=3, lora_alpha=6, prepare=train_fa, noise=0.2)),
    Case("dora", ("dora", "lora"), peft(LoraConfig, r=7, lora_alpha=8, use_dora=True)),
    Case(
        "dora-pissa",
        ("dora", "lora"),
        peft(LoraConfig, r=3, init_lora_weights="pissa", use_dora=True, modules=ATTENTION),
    ),
    Case("pissa", LORA, peft(LoraConfig, r=16, lora_alpha=16, init_lora_weights="pissa")),
    Case("pissa-converted", LORA, converted),
    Case("pissa-told", LORA, residual("pissa", 3, ATTENTION)),
    Case("olora", LORA, peft(LoraConfig, r=7, lora_alpha=9, init_lora_weights="olora")),
    Case("milora", LORA, residual("milora", 16, MODULES)),
    Case(
        "adalora",
        ("adalora", "lora"),
        peft(AdaLoraConfig, init_r=7, total_step=9, noise=0.3, prepare=allocate, reload=True),
    ),
    Case("vera", ("vera", "lora"), peft(VeraConfig, r=33, noise=0.5)),
    Case(
        "vera-drawn-again",
        ("vera", "lora"),
        peft(
            VeraConfig,
            r=16,
            noise=0.5,
            save_projection=False,
            projection_prng_key=7,
            modules=["k_proj", "o_proj", "down_proj"],
        ),
    ),
    Case("loha", ("loha", "lora"), peft(LoHaConfig, r=3, alpha=3, noise=0.3)),
    Case("lokr", ("lokr", "lora"), peft(LoKrConfig, r=2, alpha=1, modules=ATTENTION)),
    Case("tinylora", ("tinylora", "core"), peft(TinyLoraConfig, r=7, u=5), explicit=True),
    Case(
        "tinylora-drawn-again",
        ("tinylora", "core"),
        peft(
            TinyLoraConfig,
            r=2,
            u=3,
            noise=0.4,
            save_projection=False,
            modules=["v_proj", "gate_proj"],
        ),
        explicit=True,
    ),
    Case("xs", XS, drawn("lora_xs", 16), explicit=True),
    Case("xs-rotated", XS, drawn("rotated_xs", 7, modules=ATTENTION), explicit=True),
    Case("xs-compact", XS, drawn("compact_xs", 33)),
    Case("xs-foreign", XS, drawn("foreign_xs", 3), explicit=True),
    Case("xs-alike", ("lora_xs", "lora"), drawn("odd_xs", 2, partial=True)),
    Case("miss", FOLD, peft(MissConfig, r=7, noise=0.05)),
    Case("miss-64", FOLD, peft(MissConfig, r=64, noise=0.05, modules=["q_proj", "down_proj"])),
    Case(
        "miss-mini",
        FOLD,
        peft(
            MissConfig,
            r=16,
            mini_r=3,
            init_weights="mini",
            noise=0.05,
            modules=["q_proj", "o_proj", "down_proj"],
        ),
    ),
    Case("miss-output", ("miss", "lora"), shards(33, ["q_proj", *MLP], 0.05)),
    Case("bone", FOLD, bone(peft(MissConfig, r=3, noise=0.05, layers=[1]))),
    Case("svf", ("svf", SPECTRAL), drawn("svf", 1, modules=MLP)),
    Case("svft", ("svft", SPECTRAL), drawn("svft", 3, modules=ATTENTION)),
    Case("svft-kept", ("svft", SPECTRAL), drawn("svft_kept", 16, partial=True)),
)
