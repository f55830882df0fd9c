"""What a fleet gains and costs: ``python -m shoal.adapters.training.fleet.bench WHAT``.

========  ==================================================================================
ratio     a fleet of LoRA-XS tenants, one record each a step, against one tenant after the
          other at batch size 1 with the plain trainer: whole runs on disk, with the time of
          a step and of a whole run
same      what tenants of a fleet got, against what some of them get alone: weights, losses and
          gradient norms, in the dtype asked for (float32 is what has to agree)
gradient  what the adapters add to the base's own backward pass, and the kernels' share
capacity  how many tenants fit beside a base, with activation checkpointing
all       those of ``PLANS``, one after the other; what the file of ``--json`` has already is left
          out
========  ==================================================================================

Bases have random weights and the shape of a known model; they are made on the device. Each
measurement is one JSON object, a line of the output; ``--json`` appends it to a file.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.adapters.spec import Target
from shoal.adapters.training.activations import checkpoint_activations
from shoal.adapters.training.attention import use_causal_attention
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.environment import describe, peak_bytes
from shoal.adapters.training.fleet.config import FleetConfig
from shoal.adapters.training.fleet.inputs import FleetInputs, Row, fleet_inputs
from shoal.adapters.training.fleet.linears import (
    BankLinear,
    CoreGroup,
    FoldGroup,
    attach_banks,
    groups_of,
    values_per_lane,
)
from shoal.adapters.training.fleet.products import Step
from shoal.adapters.training.fleet.step import FleetStep
from shoal.adapters.training.fleet.trainer import train_fleet
from shoal.adapters.training.loading import device_of
from shoal.adapters.training.methods.attaching import find_linears
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.metrics import read_steps
from shoal.adapters.training.norms import fuse_norms
from shoal.adapters.training.rotary import fuse_rotary
from shoal.adapters.training.trainer import train
from shoal.kernels.lane_matmul.kernel import lane_matmul
from shoal.kernels.lane_outer.kernel import lane_outer
from shoal.kernels.lane_rows import upload_rows

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "rope_theta": 500000.0, "max_position_embeddings": 8192,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Options:
    """One measurement: see the command line."""

    what: str
    model_shape: str = "smollm2"
    layers: int | None = None
    method: str = "lora-xs"
    tenants: int = 64
    rank: int = 16
    length: int = 128
    steps: int = 20
    device: str = "auto"
    dtype: str = "auto"


# What is worth knowing of a large GPU. What needs its memory comes before what records graphs,
# since those are kept.
PLANS = (
    Options("capacity", "llama-3.1-8b", tenants=512, steps=3),
    Options("gradient", "llama-3.1-8b", layers=4, tenants=128),
    Options("ratio", length=64),
    Options("same", length=64, dtype="float32"),
    Options("ratio", length=128),
    Options("gradient", "llama-3.1-8b", layers=4, tenants=128, method="miss"),
    Options("gradient"),
    Options("ratio", length=64, method="miss"),
    Options("capacity", "llama-3.1-8b", tenants=1024, length=64, steps=3),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*MEASURES, "all"))
    parser.add_argument("--model-shape", choices=tuple(SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--method", choices=("lora-xs", "miss"), default="lora-xs")
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a record")
    parser.add_argument("--steps", type=int, default=20, help="measured ones")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--json", type=Path, help="append the results here")
    parser.add_argument(
        "--budget-s", type=float, default=float("inf"), help="begin nothing after so many seconds"
    )
    values = vars(parser.parse_args(argv))
    path, budget = values.pop("json"), values.pop("budget_s")
    began = time.perf_counter()
    failed = False
    for options in PLANS if values["what"] == "all" else (Options(**values),):
        if values["what"] == "all" and _is_there(path, options):
            continue
        if time.perf_counter() - began > budget:
            break
        record = _measure(options)
        failed |= "error" in record
        line = json.dumps(record)
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        print(line, flush=True)
    return int(failed)


def _measure(options: Options) -> dict[str, Any]:
    """One record; what fails says so in it, and the next is measured all the same."""
    device = device_of(options.device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    try:
        found = MEASURES[options.what](options, device)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    took = round(time.perf_counter() - began, 1)
    return {**asdict(options), **found, "took_s": took, "environment": describe(device)}


def _is_there(path: Path | None, options: Options) -> bool:
    if path is None or not path.exists():
        return False
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    wanted = asdict(options)
    return any(
        "error" not in record and {name: record.get(name) for name in wanted} == wanted
        for record in records
    )


# ------------------------------------------------------------------------------------- ratio


def ratio(options: Options, device: torch.device) -> dict[str, Any]:
    """Whole runs: the plain trainer for a few tenants, and the fleet for all of them."""
    steps = options.steps + 8  # the first ones record graphs and warm up
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        root = Path(folder)
        base = _saved_base(options, root, device)
        tasks = _tasks(options, root)
        common: dict[str, Any] = {
            "method": options.method, "base": base, "rank": options.rank, "batch_size": 1,
            "steps": steps, "save_every": 10 * steps, "device": options.device,
            "dtype": options.dtype, "max_length": options.length,
        }  # fmt: skip
        quiet: dict[str, Any] = {"cache_dir": root / "bases", "progress": False}

        def plain(name: str, **change: Any) -> tuple[float, float]:
            config = TrainConfig(
                **{**common, "data": root / "t0.jsonl", "out": root / name, **change}
            )
            began = time.perf_counter()
            train(config, **quiet)
            whole = time.perf_counter() - began
            return _median([s.seconds for s in read_steps(root / name / "metrics.jsonl")]), whole

        plain("first", steps=1)  # computes the basis, and compiles
        single, single_run = plain("single")
        eager, _ = plain("eager", graphs="off")

        config = FleetConfig(
            common=TrainConfig(**{**common, "data": tasks, "out": root / "fleet"}),
            fleet=tasks,
            rows=options.tenants,
        )
        began = time.perf_counter()
        result = train_fleet(config, **quiet)
        fleet_run = time.perf_counter() - began
        lines = (root / "fleet/_fleet/steps.jsonl").read_text().splitlines()
        fleet = _median([json.loads(line)["seconds"] for line in lines])
        assert all(end.fate == "finished" for end in result.tenants)
    return {
        "single_step_ms": round(1e3 * single, 3),
        "single_step_eager_ms": round(1e3 * eager, 3),
        "fleet_step_ms": round(1e3 * fleet, 3),
        "ratio": round(options.tenants * single / fleet, 2),
        "ratio_to_eager": round(options.tenants * eager / fleet, 2),
        "ratio_of_runs": round(options.tenants * single_run / fleet_run, 2),
        "tokens_s": round(options.tenants * options.length / fleet),
        "peak_gib": round(peak_bytes(device) / 2**30, 2),
        "parameters": result.parameters,
    }


def _saved_base(options: Options, root: Path, device: torch.device) -> Path:
    """A random base with a tokenizer of bytes, as a directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = root / "base"
    model = _random_model(options, device, torch.float32)
    model.save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def _tasks(options: Options, root: Path) -> Path:
    """Every tenant with records of its own: half of a record is prompt, half is to be learnt."""
    draw = random.Random(0)
    half = options.length // 2
    lines = []
    for number in range(options.tenants):
        records = (
            {
                "prompt": "".join(draw.choices("abcdefgh ", k=half)),
                "completion": "".join(draw.choices("abcdefgh ", k=options.length - half - 1)),
            }
            for _ in range(16)
        )
        text = "".join(json.dumps(record) + "\n" for record in records)
        (root / f"t{number}.jsonl").write_text(text)
        lines.append(json.dumps({"name": f"t{number}", "data": f"t{number}.jsonl", "seed": number}))
    tasks = root / "tasks.jsonl"
    tasks.write_text("\n".join(lines) + "\n")
    return tasks


def same(options: Options, device: torch.device) -> dict[str, Any]:
    """Differences after ``steps`` steps of a learning rate that moves the weights."""
    alone = range(0, options.tenants, max(1, options.tenants // 8))
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder:
        root = Path(folder)
        common: dict[str, Any] = {
            "method": options.method, "base": _saved_base(options, root, device),
            "rank": options.rank, "batch_size": 1, "steps": options.steps,
            "save_every": 10 * options.steps, "device": options.device, "dtype": options.dtype,
            "max_length": options.length, "lr": 0.01 if options.method == "lora-xs" else 1e-3,
        }  # fmt: skip
        quiet: dict[str, Any] = {"cache_dir": root / "bases", "progress": False}
        tasks = _tasks(options, root)
        config = TrainConfig(**{**common, "data": tasks, "out": root / "fleet"})
        train_fleet(FleetConfig(common=config, fleet=tasks, rows=options.tenants), **quiet)
        weights, moved, losses, norms = [], [], [], []
        for number in alone:
            own = {"data": root / f"t{number}.jsonl", "out": root / f"a{number}", "seed": number}
            train(TrainConfig(**{**common, **own}), **quiet)
            pair = [root / f"fleet/t{number}", root / f"a{number}"]
            mine, theirs = (load_file(path / "adapter_model.safetensors") for path in pair)
            trained = [name for name in theirs if not name.endswith("probe")]
            weights.append(max(float((mine[n] - theirs[n]).abs().max()) for n in trained))
            moved.append(max(float(theirs[n].abs().max()) for n in trained))
            steps = [read_steps(path / "metrics.jsonl") for path in pair]
            losses += [abs(a.loss / b.loss - 1) for a, b in zip(*steps, strict=True)]
            norms.append(abs(steps[0][0].grad_norm / steps[1][0].grad_norm - 1))
    return {
        "compared": len(weights),
        "weights_differ": max(weights),
        "weights_moved": max(moved),
        "losses_differ_relative": max(losses),
        "first_gradient_norm_differs_relative": max(norms),
    }


# ---------------------------------------------------------------------------------- gradient


def gradient(options: Options, device: torch.device) -> dict[str, Any]:
    """The backward pass with and without the fleet's adapters, and the kernels alone."""
    dtype = _dtype(options, device)
    model = _random_model(options, device, dtype)
    model.requires_grad_(False)
    use_causal_attention(model)
    fuse_norms(model)
    fuse_rotary(model)
    inputs = _inputs(options).to(device)
    embedded = model.get_input_embeddings()(inputs.input_ids).detach().requires_grad_()
    decoder = cast(Callable[..., Any], model.get_decoder())

    def passes() -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
        def forward() -> Tensor:
            output: Tensor = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
            return output

        return forward, lambda hidden: hidden.backward(torch.ones_like(hidden))

    base_forward, base_backward = _time_passes(*passes(), options, device)
    core = _core(options, model, capacity=options.tenants)
    core._step.rows = inputs.rows()
    fleet_forward, fleet_backward = _time_passes(*passes(), options, device)
    kernels = _time_kernels(core.banks, options, device, dtype)
    return {
        "tokens": inputs.input_ids.numel(),
        "base_forward_ms": round(base_forward, 3),
        "base_backward_ms": round(base_backward, 3),
        "fleet_forward_ms": round(fleet_forward, 3),
        "fleet_backward_ms": round(fleet_backward, 3),
        "kernels_ms": round(kernels, 3),
        "kernels_share": round(kernels / base_backward, 4),
        "added_share": round(fleet_backward / base_backward - 1, 4),
    }


def _time_passes(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], None],
    options: Options,
    device: torch.device,
) -> tuple[float, float]:
    """Milliseconds of both, median."""
    forwards, backwards = [], []
    for _ in range(options.steps + 3):
        with _Timer(device) as one:
            hidden = forward()
        with _Timer(device) as two:
            backward(hidden)
        forwards.append(one.ms)
        backwards.append(two.ms)
    return statistics.median(forwards[3:]), statistics.median(backwards[3:])


def _time_kernels(
    banks: Mapping[Target, BankLinear], options: Options, device: torch.device, dtype: torch.dtype
) -> float:
    """Milliseconds of the backward pass's grouped kernels over all linears, median."""
    rows = upload_rows(list(range(options.tenants)), device)
    shape = (options.tenants, options.length)
    groups = groups_of(banks.values())

    def drawn(*width: int) -> Tensor:
        return torch.randn((*shape, *width), device=device, dtype=dtype)

    thin = {m: drawn(m, options.rank) for m in {len(group.frozen) for group in groups}}
    out = {m: torch.empty_like(x) for m, x in thin.items()}
    fold = options.method == "miss"
    widths = {part.weight.shape[0] for group in groups for part in group.frozen if fold}
    wide = {width: drawn(1, width) for width in widths}

    def work() -> None:
        for group in groups:
            if isinstance(group, CoreGroup):
                x, made = thin[len(group.frozen)], out[len(group.frozen)]
                assert group.cores.grad is not None
                lane_outer(x, x, rows, group.cores.grad)
                lane_matmul(x, group.cores.detach(), rows.owners, made)
            elif isinstance(group, FoldGroup):
                for index, block in enumerate(group.blocks):
                    slope = wide[block.shape[2]]
                    lane_outer(thin[1], slope, rows, group.gradient(index)[:, None])
                    matrices = block.detach().mT[:, None]
                    lane_matmul(slope, matrices, rows.owners, out[1], add=index > 0)

    replay = work
    if device.type == "cuda":  # launches are not what is measured
        for _ in range(2):
            work()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay = graph.replay
    times = []
    for _ in range(options.steps + 3):
        with _Timer(device) as timer:
            replay()
        times.append(timer.ms)
    return statistics.median(times[3:])


# ---------------------------------------------------------------------------------- capacity


def capacity(options: Options, device: torch.device) -> dict[str, Any]:
    """All tenants in one step, one record each: does it fit, and how long does it take?"""
    model = _random_model(options, device, _dtype(options, device))
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    size = values_per_lane(model, _config(options))
    use_causal_attention(model)
    fuse_norms(model)
    fuse_rotary(model)
    core = _core(options, model, capacity=options.tenants)
    checkpoint_activations(model)
    inputs = _inputs(options)
    times = []
    outcome = core.run(inputs)
    outcome.wait()
    for _ in range(options.steps):
        with _Timer(device) as timer:
            outcome = core.run(inputs)
            outcome.wait()
        times.append(timer.ms)
    trained = int(outcome.updated.sum())
    step = statistics.median(times)
    return {
        "trained": trained,
        "parameters": size,
        "base_gib": round(base_bytes / 2**30, 2),
        "bank_gib": round(core.optimizer.values.numel() * 20 / 2**30, 2),
        "peak_gib": round(peak_bytes(device) / 2**30, 2),
        "step_ms": round(step, 1),
        "tokens_s": round(options.tenants * options.length / step * 1e3),
        "tenant_steps_s": round(options.tenants / step * 1e3, 1),
    }


# ------------------------------------------------------------------------------------ shared


class _Timer:
    """Milliseconds between entering and leaving; on a device, of the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ms = 0.0

    def __enter__(self) -> "_Timer":
        self._wait()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.ms = 1e3 * (time.perf_counter() - self._began)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _median(seconds: Sequence[float]) -> float:
    """Of the steps after the first eight, when there are more."""
    return statistics.median(seconds[8:] or seconds)


def _dtype(options: Options, device: torch.device) -> torch.dtype:
    if options.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _config(options: Options) -> TrainConfig:
    method: Any = options.method
    here = Path()
    # Each as random as the other, so the exact decomposition is not waited for.
    return TrainConfig(method=method, base=here, data=here, out=here, rank=options.rank)


def _random_model(options: Options, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A base of the shape asked for, made where it is used."""
    fields = dict(SHAPES[options.model_shape])
    if options.layers is not None:
        fields["num_hidden_layers"] = options.layers
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(LlamaConfig(**fields), dtype=dtype)
    return cast(LlamaForCausalLM, model.to(device).eval())


def _core(options: Options, model: LlamaForCausalLM, *, capacity: int) -> FleetStep:
    """A bank on a random basis, with values that make gradients."""
    factors = {}
    if options.method == "lora-xs":
        for target, (_, linear) in find_linears(model).items():
            shape = (linear.out_features, options.rank)
            drawn = torch.randn(shape, device=linear.weight.device)
            factors[target] = torch.linalg.qr(drawn).Q
    source = cast(Source, SimpleNamespace(canonical=SimpleNamespace(factors=factors)))
    step = Step()
    banks = attach_banks(model, _config(options), source, capacity, step)
    core = FleetStep(model, banks, step)
    with torch.no_grad():
        core.optimizer.values.normal_(std=1e-3)
    return core


def _inputs(options: Options) -> FleetInputs:
    """One record a tenant, of which the second half is learnt."""
    vocabulary = SHAPES[options.model_shape]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (options.tenants, options.length), generator=generator).numpy()
    places = torch.arange(options.length // 2, options.length - 1).numpy()
    parts = [(lane, [Row(ids[lane], places)]) for lane in range(options.tenants)]
    return fleet_inputs(parts, options.tenants, rates=[1e-4] * options.tenants)


MEASURES = {"ratio": ratio, "same": same, "gradient": gradient, "capacity": capacity}

if __name__ == "__main__":
    sys.exit(main())
