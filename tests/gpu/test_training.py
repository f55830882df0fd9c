"""Training steps replayed from CUDA graphs against the same steps run call by call."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shoal.adapters.training.activations import checkpoint_activations
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Example, collate, join
from shoal.adapters.training.inputs import StepInputs, step_inputs, supervised_per_lane
from shoal.adapters.training.lanes import Lane
from shoal.adapters.training.method_options import METHOD_NAMES, RANKLESS, MethodName
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all, method_of
from shoal.adapters.training.metrics import read_steps
from shoal.adapters.training.runner import CapturedRunner, EagerRunner, StepRunner, runner_for
from shoal.adapters.training.step import TrainStep
from shoal.adapters.training.trainer import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LANES = 2


def model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(CUDA, dtype).eval()


def make_step(
    method: MethodName, root: Path, dtype: torch.dtype = torch.float32, *, again: bool = False
) -> TrainStep:
    decoder = model(dtype)
    rank: dict[str, Any] = {} if method in RANKLESS else {"rank": 4}
    config = TrainConfig(method=method, base=root, data=root, out=root, seed=1, **rank)
    source = Source(weight_reader(model()), shape_of(decoder, "tiny", "0" * 64), root / "bases")
    adapted = attach_all(decoder, config, source, [1, 2])
    if again:
        checkpoint_activations(decoder)
    step = TrainStep(decoder, adapted, method_of(config))
    step.optimizer.lr.fill_(0.003)
    return step


def batches(*, packed: bool, seed: int) -> list[StepInputs]:
    """Two passes of rows of random lengths."""
    generator = torch.Generator().manual_seed(seed)

    def example() -> Example:
        length = int(torch.randint(4, 100, (1,), generator=generator))
        ids = torch.randint(0, 300, (length,), generator=generator).tolist()
        return Example(tuple(ids), (False,) * (length // 2) + (True,) * (length - length // 2))

    rows = [
        [join([example(), example()]) if packed else example() for _ in range(4 * LANES)]
        for _ in range(2)
    ]
    passes = [collate(each, 0, CPU, packed=packed, multiple=64) for each in rows]
    counts = supervised_per_lane(passes, LANES)
    return [step_inputs(each, counts, fixed_shapes=True).pinned() for each in passes]


def run(runner: StepRunner, *, packed: bool = False) -> tuple[Tensor, Tensor]:
    records = []
    for seed in range(6):
        runner.run(batches(packed=packed, seed=seed))
        records.append(runner.step.record.clone())
    return runner.step.optimizer.values.clone(), torch.stack(records)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_replayed_step_is_the_same_step(method: MethodName, packed: bool, tmp_path: Path) -> None:
    replayed = runner_for(make_step(method, tmp_path, again=packed), captured=True)
    assert isinstance(replayed, CapturedRunner)
    values, records = run(replayed, packed=packed)
    expected, expected_records = run(EagerRunner(make_step(method, tmp_path)), packed=packed)

    assert replayed._passes, "nothing was recorded"
    torch.testing.assert_close(records, expected_records, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(values, expected, atol=1e-3, rtol=1e-2)


def test_a_base_in_16_bits_is_learnt_on(tmp_path: Path) -> None:
    runner = runner_for(make_step("lora", tmp_path, torch.bfloat16), captured=True)
    inputs = batches(packed=False, seed=0)
    losses = []
    for _ in range(20):
        runner.run(inputs)
        losses.append(float(runner.step.record[0].mean()))
    assert losses[-1] < losses[0] - 1
    assert runner.step.optimizer.values.dtype == torch.float32


def test_a_lane_that_is_not_finite_stops_alone_in_a_graph(tmp_path: Path) -> None:
    step = make_step("lora", tmp_path)
    runner = runner_for(step, captured=True)
    inputs = batches(packed=False, seed=0)
    runner.run(inputs)
    step.optimizer.values[1, 0] = float("nan")
    before = step.optimizer.values.clone()
    runner.run(inputs)
    assert step.record[2].tolist() == [1, 0]
    assert step.optimizer.steps.tolist() == [2, 1]
    torch.testing.assert_close(step.optimizer.values[1], before[1], equal_nan=True)
    assert step.optimizer.values[0].isfinite().all()


def test_whole_runs_agree_with_and_without_graphs(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_base(base)
    data = tmp_path / "data.jsonl"
    pairs = [("a" * (n % 90 + 1), "bcd" * (n % 7 + 1)) for n in range(40)]
    lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs)
    data.write_text("\n".join(lines) + "\n")
    lanes = [Lane("one", 1), Lane("two", 2)]
    for graphs in ("auto", "off"):
        config = TrainConfig(
            method="lora-xs",
            base=base,
            data=data,
            eval_data=data,
            eval_every=5,
            out=tmp_path / graphs,
            steps=12,
            rank=4,
            lr=0.02,
            device="cuda",
            dtype="float32",
            graphs=graphs,
        )
        results = train(config, lanes=lanes, cache_dir=tmp_path / "bases", progress=False)
        assert [result.fate for result in results] == ["finished", "finished"]
    for lane in lanes:
        auto, off = (
            [step.loss for step in read_steps(tmp_path / graphs / lane.name / "metrics.jsonl")]
            for graphs in ("auto", "off")
        )
        assert len(auto) == 12
        assert auto == pytest.approx(off, rel=1e-2)


def write_base(directory: Path) -> None:
    """The tiny decoder with bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(directory)
    model().cpu().save_pretrained(directory)
