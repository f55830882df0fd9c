"""``python -m shoal.adapters.training.bench_step``: seconds and memory of a training step.

Each method is measured against PEFT's LoRA on the same base, batch and precision, in one process:
rounds of steps in turn, so that what the machine does meanwhile falls on all alike; medians over
rounds. All tokens are learnt unless told otherwise, since PEFT computes the logits of all of them
and we do not. PEFT runs as its users run it: transformers' loss, clipping, PyTorch's fused AdamW.

Memory is the peak of what torch had allocated for a contestant: its copy of the base, adapter,
optimiser and activations. On a CPU it is known only when one contestant runs alone (``--only``):
then it is the process's resident set. The last line is one JSON object.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shoal.adapters.basis import Basis, make_basis
from shoal.adapters.training.activations import checkpoint_activations
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Batch, Example, collate
from shoal.adapters.training.environment import describe, peak_bytes
from shoal.adapters.training.inputs import step_inputs, supervised_per_lane
from shoal.adapters.training.loading import device_of
from shoal.adapters.training.method_options import (
    METHOD_NAMES,
    RANK_DEFAULT,
    RANKLESS,
    MethodName,
)
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all, method_of
from shoal.adapters.training.runner import runner_for
from shoal.adapters.training.step import TrainStep

# Shapes to measure on without a download: the values of the weights do not matter.
SHAPES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
PEFT = "peft-lora"


@dataclass(frozen=True, slots=True)
class Setting:
    """What all contestants have in common."""

    base: str
    batch_size: int
    length: int
    supervised: float
    rank: int
    lanes: int
    dtype: str
    checkpoint_activations: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant's figures.

    Attributes:
        name: method, and how it was run.
        lanes: adapters trained at once, with ``batch_size`` rows each.
        ms: median milliseconds of a step.
        p20, p80: of the rounds' means.
        peak_mb: see the module.
        parameters: trained values of one adapter.
        time_ratio, memory_ratio: over PEFT's.
    """

    name: str
    lanes: int
    ms: float
    p20: float
    p80: float
    peak_mb: float | None
    parameters: int
    time_ratio: float | None = None
    memory_ratio: float | None = None


class Contestant(ABC):
    """Something that makes training steps."""

    name: str
    lanes = 1
    parameters = 0

    @abstractmethod
    def step(self) -> None:
        """Launch one; it may still be under way afterwards."""


class Peft(Contestant):
    """PEFT's LoRA in the usual loop."""

    name = PEFT

    def __init__(self, model: PreTrainedModel, batch: Batch, setting: Setting) -> None:
        """Wrap the model."""
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rank = setting.rank
        wanted = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")
        if setting.checkpoint_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        self._model = get_peft_model(model, wanted).train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        device = self._trained[0].device
        self.parameters = sum(p.numel() for p in self._trained)
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, fused=device.type == "cuda")
        self._ids = batch.input_ids.to(device)
        self._labels = torch.where(batch.supervised, batch.input_ids, -100).to(device)

    def step(self) -> None:
        """As the class says."""
        self._optimizer.zero_grad()
        loss = self._model(input_ids=self._ids, labels=self._labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()


class Ours(Contestant):
    """A method of this trainer, call by call or replayed."""

    def __init__(
        self,
        method: MethodName,
        model: PreTrainedModel,
        batch: Batch,
        setting: Setting,
        graph: bool,
    ) -> None:
        """Put adapters on the model."""
        self.name = f"{method}{' graph' if graph else ''}"
        self.lanes = setting.lanes
        nowhere = Path(tempfile.gettempdir())
        config = TrainConfig(
            method=method,
            base=nowhere,
            data=nowhere,
            out=nowhere,
            rank=RANK_DEFAULT if method in RANKLESS else setting.rank,
        )
        source = _BenchSource(weight_reader(model), shape_of(model, "bench", "0" * 64), nowhere)
        adapted = attach_all(model, config, source, list(range(self.lanes)))
        if setting.checkpoint_activations:
            checkpoint_activations(model)
        step = TrainStep(model, adapted, method_of(config))
        step.optimizer.lr.fill_(1e-4)
        self.parameters = step.optimizer.values.shape[1]
        self._runner = runner_for(step, captured=graph)
        counts = supervised_per_lane([batch], self.lanes)
        inputs = step_inputs(batch, counts, fixed_shapes=self._runner.fixed_shapes)
        self._inputs = inputs.to(step.device)

    def step(self) -> None:
        """As the class says."""
        self._runner.run([self._inputs])


class _BenchSource(Source):
    """Gives a basis at once; which one it is costs no time in a step."""

    @cached_property
    def canonical(self) -> Basis:
        """Orthonormal columns."""
        rank = min(64, *(min(dims.d_out, dims.d_in) for dims in self.shape.dims.values()))
        factors = {
            target: torch.linalg.qr(torch.randn(self.shape.dims[target.module].d_out, rank)).Q
            for target in self.shape.targets()
        }
        return make_basis(factors, kind="uploaded", base_digest=self.shape.digest)


def make_batch(setting: Setting, vocab_size: int, lanes: int) -> Batch:
    """Rows of random tokens, full length, the last ones learnt."""
    generator = torch.Generator().manual_seed(0)
    learnt = max(1, round(setting.supervised * setting.length))
    marks = (False,) * (setting.length - learnt) + (True,) * learnt
    shape = (lanes * setting.batch_size, setting.length)
    rows = torch.randint(0, vocab_size, shape, generator=generator).tolist()
    return collate([Example(tuple(row), marks) for row in rows], 0, torch.device("cpu"))


def measure(
    names: Sequence[str],
    base: PreTrainedModel,
    setting: Setting,
    *,
    graphs: bool,
    steps: int,
    rounds: int,
) -> list[Row]:
    """Build the contestants, warm them up, and let them run in turn."""
    device = next(base.parameters()).device
    contestants: list[Contestant] = []
    peaks: list[float | None] = []
    vocab_size = base.config.vocab_size
    alone = len(names) * (1 + graphs) == 1
    for name in names:
        for graph in (False, True) if graphs and name != PEFT else (False,):
            before = _allocated(device)
            model = copy.deepcopy(base)
            if name == PEFT:
                one = make_batch(setting, vocab_size, 1)
                contestants.append(Peft(model, one, setting))
            else:
                batch = make_batch(setting, vocab_size, setting.lanes)
                method = next(known for known in METHOD_NAMES if known == name)
                contestants.append(Ours(method, model, batch, setting, graph))
            for _ in range(3):
                contestants[-1].step()
            _wait(device)
            peaks.append((peak_bytes(device) - before) / 1e6 if before is not None else None)
    if device.type == "cpu" and alone:
        peaks = [peak_bytes(device) / 1e6]
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds):
        for place in range(len(contestants)):
            index = (turn + place) % len(contestants)
            _wait(device)
            started = time.perf_counter()
            for _ in range(steps):
                contestants[index].step()
            _wait(device)
            times[index].append((time.perf_counter() - started) / steps * 1e3)
    rows = [
        Row(
            name=each.name,
            lanes=each.lanes,
            ms=round(statistics.median(own), 3),
            p20=round(sorted(own)[len(own) // 5], 3),
            p80=round(sorted(own)[-1 - len(own) // 5], 3),
            peak_mb=None if peak is None else round(peak, 1),
            parameters=each.parameters,
        )
        for each, own, peak in zip(contestants, times, peaks, strict=True)
    ]
    return [_compared(row, rows) for row in rows]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    base_help = f"a Hugging Face directory, or a shape: {', '.join(SHAPES)}"
    parser.add_argument("--base", default="smollm2-135m", help=base_help)
    parser.add_argument("--methods", default="lora-xs,lora,miss", help="separated by commas")
    parser.add_argument("--only", action="store_true", help="without PEFT")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens learnt")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lanes", type=int, default=1, help="adapters at once (PEFT: 1)")
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--graphs", default="auto", choices=("auto", "off"))
    parser.add_argument("--checkpoint-activations", action="store_true")
    args = parser.parse_args()
    device = device_of(args.device)
    cuda = device.type == "cuda"
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    setting = Setting(
        args.base,
        args.batch_size,
        args.length,
        args.supervised,
        args.rank,
        args.lanes,
        dtype,
        args.checkpoint_activations,
    )
    names = ([] if args.only else [PEFT]) + args.methods.split(",")
    unknown = [name for name in names if name not in (PEFT, *METHOD_NAMES)]
    if unknown:
        parser.error(f"methods: {unknown} not among {', '.join(METHOD_NAMES)}")
    rows = measure(
        names,
        load(args.base, device, dtype),
        setting,
        graphs=cuda and args.graphs == "auto",
        steps=args.steps,
        rounds=args.rounds,
    )
    columns = ("lanes", "ms", "p20", "p80", "MB", "time", "memory")
    print(f"{'step':<20}" + "".join(f"{column:>10}" for column in columns))
    for row in rows:
        figures = (row.ms, row.p20, row.p80, row.peak_mb, row.time_ratio, row.memory_ratio)
        texts = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        print(f"{row.name:<20}{row.lanes:>10}" + "".join(f"{text:>10}" for text in texts))
    record = {
        "bench": "training-step",
        "setting": asdict(setting),
        "steps": args.steps,
        "rounds": args.rounds,
        "environment": describe(device),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(record))


def load(base: str, device: torch.device, dtype: str) -> PreTrainedModel:
    """The base, frozen; random where only its shape was named."""
    kind: torch.dtype = getattr(torch, dtype)
    if base in SHAPES:
        torch.manual_seed(0)
        model = LlamaForCausalLM(SHAPES[base]).to(kind)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=kind, local_files_only=True)
    frozen: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return frozen


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    reference = next((other for other in rows if other.name == PEFT), None)
    if reference is None:
        return row
    memory = None
    if row.peak_mb is not None and reference.peak_mb is not None:
        memory = round(row.peak_mb / reference.peak_mb, 3)
    return replace(row, time_ratio=round(row.ms / reference.ms, 3), memory_ratio=memory)


def _allocated(device: torch.device) -> int | None:
    """What torch has allocated, after which the peak is counted anew; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
