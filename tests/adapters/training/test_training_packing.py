"""Packed rows: their plan, and that they give the unpacked loss and gradients."""

import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shoal.adapters.training.data import Batch, Example, collate, fill_of, join, row_order
from shoal.adapters.training.data.batches import packed_mask
from shoal.adapters.training.data.packing import plan_rows

CPU = torch.device("cpu")


def random_examples(count: int, seed: int) -> list[Example]:
    source = random.Random(seed)
    examples = []
    for _ in range(count):
        length = source.randint(3, 14)
        ids = tuple(source.randrange(2, 200) for _ in range(length))
        # Also where the first token is to be learnt, which nothing can predict.
        examples.append(Example(ids, tuple(source.random() < 0.6 for _ in range(length))))
    return examples


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    packed: dict[str, Tensor | None] = {}
    if batch.segments is not None:
        seen = packed_mask(batch.segments)
        # To be added: transformers' own attention in Python takes no other.
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        packed = {"attention_mask": mask, "position_ids": batch.position_ids}
    logits = model(input_ids=batch.input_ids, use_cache=False, **packed).logits[:, :-1]
    wanted = batch.supervised[:, 1:]
    return F.cross_entropy(logits[wanted], batch.input_ids[:, 1:][wanted], reduction="sum")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_has_the_loss_and_gradients_of_its_records(attention: str, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
    examples = random_examples(11, seed=1)
    rows = plan_rows([len(e.input_ids) for e in examples], range(11), 32)
    assert any(len(row) > 2 for row in rows)
    packed = collate(
        [join([examples[i] for i in row]) for row in rows], 0, CPU, packed=True, multiple=8
    )

    def gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = summed_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    apart = [gradients(collate([example], 0, CPU)) for example in examples]
    loss, gradient = gradients(packed)

    torch.testing.assert_close(loss, sum(part for part, _ in apart))
    for index, grad in enumerate(gradient):
        whole = torch.stack([parts[index] for _, parts in apart]).sum(dim=0)
        torch.testing.assert_close(grad, whole, atol=1e-4, rtol=1e-4)
    assert packed.num_tokens == sum(len(example.input_ids) for example in examples)
    assert packed.num_supervised == sum(sum(example.supervised[1:]) for example in examples)


def test_the_mask_is_block_diagonal_and_causal() -> None:
    one, two = (Example((5,) * n, (True,) * n) for n in (2, 3))
    batch = collate([join([one, two]), two], 0, CPU, packed=True, multiple=4)

    assert batch.input_ids.shape == (2, 8)
    assert batch.position_ids is not None
    assert batch.segments is not None
    assert batch.position_ids[0].tolist() == [0, 1, 0, 1, 2, 0, 0, 0]
    assert batch.segments.tolist() == [[1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.supervised[0].tolist() == [False, True, False, True, True, False, False, False]
    mask = packed_mask(batch.segments)
    for query in range(8):
        seen = mask[0, 0, query].nonzero().flatten().tolist()
        start = 0 if query < 2 else 2 if query < 5 else 5
        assert seen == list(range(start, query + 1))


@pytest.mark.parametrize("seed", range(20))
def test_every_epoch_holds_each_record_once_and_no_row_overflows(seed: int) -> None:
    source = random.Random(seed)
    lengths = [source.randint(1, 60) for _ in range(source.randint(1, 150))]
    capacity = source.randint(max(lengths), 128)
    rows = []
    epochs = 0
    seen: list[int] = []
    for row in row_order(lengths, seed, capacity):
        assert row
        assert sum(lengths[index] for index in row) <= capacity
        rows.append(row)
        seen += row
        if len(seen) == len(lengths):
            assert sorted(seen) == list(range(len(lengths)))
            epochs, seen = epochs + 1, []
        if epochs == 3:
            break
    # A resumed run skips rows, and finds the same ones behind them.
    skip = len(rows) // 2
    assert list(islice(row_order(lengths, seed, capacity), skip, len(rows))) == rows[skip:]
    if len(lengths) > 20:
        assert rows != list(islice(row_order(lengths, seed + 1, capacity), len(rows)))


def test_rows_are_well_filled_and_records_of_all_lengths_mix() -> None:
    source = random.Random(0)
    lengths = [source.randint(20, 150) for _ in range(2000)]
    rows = plan_rows(lengths, range(2000), 512)

    assert fill_of(lengths, rows[:-1], 512) > 0.95
    means = [sum(lengths[i] for i in row) / len(row) for row in rows]
    halves = means[: len(means) // 2], means[len(means) // 2 : -1]
    assert abs(sum(halves[0]) / len(halves[0]) - sum(halves[1]) / len(halves[1])) < 15


def test_without_packing_a_row_is_one_record() -> None:
    rows = list(islice(row_order([3, 4, 5], 1, None), 6))
    assert sorted(rows[:3]) == sorted(rows[3:]) == [(0,), (1,), (2,)]
