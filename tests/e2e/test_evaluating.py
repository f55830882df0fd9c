"""Evaluations through the engine against plain transformers with merged weights (fp32)."""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.adapters.training.errors import DataRejected
from shoal.adapters.training.evaluation.evaluating import evaluate
from shoal.adapters.training.evaluation.source import BASE, Continuation, Question
from shoal.adapters.training.evaluation.spec import TaskSpec
from shoal.adapters.training.evaluation.tasks import Prompt, Task, read_task
from shoal.server.__main__ import main
from shoal.server.config import ServeConfig
from shoal.server.evaluating.engine_source import AdapterUnusable, EngineSource, open_source
from shoal.server.evaluating.run import evaluate_directories

pytestmark = pytest.mark.usefixtures("own_cache")

# Every family, two bases of LoRA-XS, and one that changes nothing.
KINDS = [("lora_xs", 4), ("foreign_xs", 5), ("miss", 8), ("lora", 3), ("svf", 1), ("zero", 4)]
EOS = 1
DEVICE = os.environ.get("SHOAL_TEST_DEVICE", "cpu")
# Nats a token. On a card the kernels round products to fewer bits.
TOLERANCE = 1e-4 if DEVICE == "cpu" else 3e-3


@pytest.fixture(scope="module")
def adapters(make_adapter: Callable[..., Any]) -> dict[str, Any]:
    """By name; each name is its kind."""
    made = {}
    for seed, (kind, rank) in enumerate(KINDS):
        strength = {"strength": 0.0} if kind == "zero" else {}
        made[kind] = make_adapter("lora" if kind == "zero" else kind, rank, seed, **strength)
    return made


def config(tiny: Any, **change: object) -> ServeConfig:
    fields: dict[str, Any] = {
        "model": str(tiny.path),
        # On a card: SHOAL_TEST_DEVICE=cuda, for the plain and the fused runner.
        "device": DEVICE,
        "dtype": "float32",
        "gpu_memory_utilization": 0.2,
        "basis_rank": 16,
        "max_model_len": 128,
        "block_size": 4,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 150,
        "spectral_memory": 64 << 20,
    }
    return ServeConfig(**(fields | change))


def folder_of(adapter: Any) -> Path:
    return next(iter(adapter.files.values())).parent  # type: ignore[no-any-return]


def added(source: EngineSource, adapters: dict[str, Any]) -> EngineSource:
    for name, adapter in adapters.items():
        source.add(name, folder_of(adapter))
    return source


@pytest.fixture(scope="module")
def log_probabilities(
    tiny: Any, adapters: dict[str, Any]
) -> Callable[[str, Sequence[int]], torch.Tensor]:
    """``(positions, vocab)`` float64 of an adapter, by plain transformers."""
    models = {name: tiny.merged(adapter.deltas) for name, adapter in adapters.items()}
    models[BASE] = tiny.model

    @torch.inference_mode()
    def of(name: str, ids: Sequence[int]) -> torch.Tensor:
        logits = models[name](torch.tensor([list(ids)])).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)

    return of


def ids_of(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, 258) for _ in range(length))


def test_answers_of_a_mixed_batch_are_those_of_merged_weights(
    tiny: Any, adapters: dict[str, Any]
) -> None:
    rng = random.Random(3)
    prompts = [ids_of(rng, rng.randrange(1, 30)) for _ in range(4)]
    names = [BASE, *adapters]
    with open_source(config(tiny)) as source:
        added(source, adapters)
        questions = [
            Question(name, len(prompts) * at + index, prompt, 9)
            for at, name in enumerate(names)
            for index, prompt in enumerate(prompts)
        ]
        answers = {answer.question.key: answer for answer in source.generate(questions)}
    assert len(answers) == len(questions)
    for question in questions:
        deltas = adapters[question.adapter].deltas if question.adapter != BASE else None
        expected = tiny.greedy(question.prompt_ids, 9, deltas)
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert list(answers[question.key].token_ids) == expected, question
        assert answers[question.key].finished == (expected[-1] == EOS)


@pytest.mark.usefixtures("any_runner")
def test_likelihoods_of_given_tokens_are_transformers(
    tiny: Any, adapters: dict[str, Any], log_probabilities: Any
) -> None:
    rng = random.Random(4)
    wanted = []
    for name in (BASE, *adapters):
        for prompt_length, lengths in ((1, (1, 1, 1)), (17, (1, 5, 2)), (60, (3, 60))):
            prompt = ids_of(rng, prompt_length)
            wanted += [Continuation(name, 0, prompt, ids_of(rng, length)) for length in lengths]
    wanted = [replace(one, key=number) for number, one in enumerate(wanted)]
    with open_source(config(tiny)) as source:
        found = list(added(source, adapters).likelihoods(wanted))
    assert sorted(one.continuation.key for one in found) == list(range(len(wanted)))
    for one in found:
        asked = one.continuation
        ids = [*asked.prompt_ids, *asked.token_ids]
        table = log_probabilities(asked.adapter, ids[:-1])[len(asked.prompt_ids) - 1 :]
        expected = sum(float(row[token]) for row, token in zip(table, asked.token_ids, strict=True))
        # Per token, as is the rounding.
        assert one.total == pytest.approx(expected, abs=TOLERANCE * len(asked.token_ids))


@pytest.mark.usefixtures("any_runner")
def test_divergences_are_those_of_the_full_distributions(
    tiny: Any, adapters: dict[str, Any], log_probabilities: Any
) -> None:
    rng = random.Random(5)
    texts = [ids_of(rng, length) for length in (2, 31, 60)]
    with open_source(config(tiny)) as source:
        parts = list(added(source, adapters).divergences([BASE, *adapters], texts))
    assert len(parts) == len(texts) * (1 + len(adapters))
    for part in parts:
        ids = texts[part.key]
        p = log_probabilities(BASE, ids[:-1])
        q = log_probabilities(part.adapter, ids[:-1])
        cross_entropy = float(-(p.exp() * q).sum())
        assert part.positions == len(ids) - 1
        assert part.cross_entropy == pytest.approx(cross_entropy, rel=TOLERANCE)
        assert part.entropy == pytest.approx(float(-(p.exp() * p).sum()), rel=TOLERANCE)
        assert part.kl == pytest.approx(
            float((p.exp() * (p - q)).sum()), rel=10 * TOLERANCE, abs=TOLERANCE
        )
        nll = -sum(float(row[token]) for row, token in zip(q, ids[1:], strict=True))
        assert part.nll == pytest.approx(nll, rel=TOLERANCE)
        if part.adapter in (BASE, "zero"):
            # What changes nothing has forgotten nothing: the least value, and 0.
            assert part.kl == pytest.approx(0.0, abs=1e-6)
            assert part.cross_entropy == pytest.approx(part.entropy, abs=1e-6 * part.positions)
        else:
            assert part.kl > 0.01


def test_a_small_bank_and_host_tier_change_no_score(tiny: Any, adapters: dict[str, Any]) -> None:
    rng = random.Random(6)
    texts = [ids_of(rng, 20)]
    questions = [Question(name, n, ids_of(rng, 5), 6) for n, name in enumerate(adapters)]

    def measured(**change: object) -> tuple[Any, Any]:
        with open_source(config(tiny, **change)) as source:
            added(source, adapters)
            parts = source.divergences(list(adapters), texts)
            kl = {part.adapter: part.kl for part in parts}
            return kl, {a.question.key: a.token_ids for a in source.generate(questions)}

    roomy, small = measured(), measured(adapter_memory=64 << 10, host_adapter_memory=64 << 10)
    assert small[0] == pytest.approx(roomy[0], abs=1e-5)
    assert small[1] == roomy[1]


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    """One of each kind."""
    lines = {
        "words": [{"prompt": "ab", "answer": "x"}, {"prompt": "cd", "answer": ["y", "z"]}],
        "letters": [
            {"messages": [{"role": "user", "content": "q"}], "choices": ["a", "bc"], "answer": 0},
            {"prompt": "r", "choices": ["a", "d"], "answer": "d"},
        ],
        "prose": [{"text": "the quick brown fox"}, {"text": "jumps"}],
    }
    made = []
    for name, values in lines.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        options = {"words": {"max_tokens": "6"}, "prose": {"length": "8"}}.get(name, {})
        made.append(read_task(TaskSpec(str(path), options)))
    return made


def test_a_whole_evaluation_is_reported_and_not_repeated(
    tiny: Any, adapters: dict[str, Any], tasks: list[Task], tmp_path: Path
) -> None:
    folders = [folder_of(adapters[kind]) for kind in ("lora", "miss", "zero")]
    out = tmp_path / "out"
    first = evaluate_directories(folders, tasks, config=config(tiny), out=out, progress=False)
    assert len(first.scores) == 4 * 3
    assert [part.metric for part in first.throughput] == ["exact", "choice", "forgetting"]
    by_task = {(score.adapter, score.task): score.values for score in first.scores}
    zero = folders[-1].name
    assert by_task[zero, "letters"] == by_task[BASE, "letters"]
    assert by_task[zero, "prose"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert math.isclose(
        by_task[BASE, "prose"]["cross_entropy"], by_task[BASE, "prose"]["entropy"], rel_tol=1e-6
    )
    lines = (out / "results.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert {path.name for path in out.iterdir()} == {
        "answers.jsonl",
        "forgetting.png",
        "parameters.png",
        "results.jsonl",
        "table.md",
        "throughput.jsonl",
    }
    # Killed after some scores, in the middle of a line: only what is missing is measured.
    (out / "results.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])
    again = evaluate_directories(folders, tasks, config=config(tiny), out=out, progress=False)
    assert [score.values for score in again.scores] == [
        pytest.approx(score.values) for score in first.scores
    ]
    assert sum(part.items for part in again.throughput) < sum(p.items for p in first.throughput)
    assert sorted((out / "results.jsonl").read_text().splitlines()[:7]) == sorted(lines[:7])
    third = evaluate_directories(folders, tasks, config=config(tiny), out=out, progress=False)
    assert third.throughput == ()


def test_what_the_base_cannot_be_asked_is_refused_with_its_line(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "a", "answer": "x"}, {"prompt": "a" * 200, "answer": "x"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (
        open_source(config(tiny)) as source,
        pytest.raises(DataRejected, match=r"line 2: has 200 tokens"),
    ):
        evaluate(
            source, {}, [read_task(TaskSpec(str(path), {"max_tokens": "4"}))], metrics=["exact"]
        )


def test_an_adapter_that_cannot_be_served_is_named(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with (
        open_source(config(tiny)) as source,
        pytest.raises(AdapterUnusable, match=str(tmp_path)),
    ):
        source.add("broken", tmp_path)


def test_prompts_are_encoded_as_a_server_does(tiny: Any) -> None:
    with open_source(config(tiny)) as source:
        chat = source.encode(Prompt(messages=(("user", "hi"),)))
        assert bytes(source._parts.tokenizer.decode(chat), "utf-8") == b"<|user|>hi\n<|assistant|>"
        assert source.encode(Prompt(text="hi")) == source.encode_text("hi")


def test_the_command_evaluates_a_registry_without_writing_to_it(
    tiny: Any, adapters: dict[str, Any], tasks: list[Task], tmp_path: Path, capsys: Any
) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    with open_source(config(tiny, registry=url)) as source:
        source._parts.library.upload("voice", adapters["lora"].files)
        source._parts.library.upload("tone", adapters["lora"].files, owner="acme")
    command = ["evaluate", str(tiny.path), "--adapters", "voice", "--registry", url]
    command += ["--tasks", str(tasks[1].source), "--out", str(tmp_path / "out"), "--quiet"]
    command += ["--max-model-len", "128", "--basis-rank", "16", "--device", DEVICE]
    assert main(command) == 0
    assert "| voice | lora | 3 |" in capsys.readouterr().out
    command[3] = "acme/tone@1"
    assert main(command) == 0
    assert "| acme/tone@1 | lora | 3 |" in capsys.readouterr().out
    for unknown in ("nobody", "tone", "acme/voice"):
        command[3] = unknown
        assert main(command) == 2
        assert unknown in capsys.readouterr().err
