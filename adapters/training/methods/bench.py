"""One step of a method against PEFT's LoRA: the same model, batch, loss and optimiser, in turns.

    python -m shoal.adapters.training.methods.bench --method lora-xs --rank 16

A random model of SmolLM2-135M's shape, or ``--layers`` of it. Both contenders are resident; rounds
alternate between them, so that a busy machine slows both. Prints a line each, then one JSON object
with the ratios. Memory is what a step needs beside model and optimiser: on CUDA the allocator's
peak, on a CPU the bytes that the forward pass keeps for the backward pass.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.adapters.spec import MODULES
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.method_options import METHOD_NAMES, RANKLESS, MethodName
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all


@dataclass
class Contender:
    """A model with adapters on it, and its measurements.

    Attributes:
        seconds: each round's, of one step.
        bytes: what a step needs beside what is resident.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0

    def step(self, ids: Tensor) -> None:
        """Forward, backward, update."""
        self.loss(ids).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, ids: Tensor) -> Tensor:
        """Mean over all tokens but the first."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def contender(name: str, model: nn.Module) -> Contender:
    """With torch's AdamW on whatever is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contender(name, model, torch.optim.AdamW(trained, lr=1e-4))


def ours(make: Callable[[], nn.Module], method: MethodName, rank: int, cache: Path) -> Contender:
    """One lane of a method."""
    model = make()
    asked: dict[str, Any] = {} if method in RANKLESS else {"rank": rank}
    config = TrainConfig(method=method, base=cache, data=cache, out=cache, **asked)
    source = Source(weight_reader(model), shape_of(model, "bench", "0" * 64), cache)
    started = time.perf_counter()
    attach_all(model, config, source)
    print(f"{method:12} initialised in {time.perf_counter() - started:.2f} s")
    return contender(method, model)


def pefts(make: Callable[[], nn.Module], rank: int, *, autocast: bool) -> Contender:
    """PEFT's LoRA; ``autocast``: float32 adapters over a 16-bit base, as PEFT has it by default."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(MODULES))
    model = get_peft_model(make(), config, autocast_adapter_dtype=autocast)
    return contender("peft-lora" if autocast else "peft-lora in the base's dtype", model)


def measure(one: Contender, ids: Tensor, record: bool) -> None:
    """One step; on CUDA its peak."""
    cuda = ids.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
    started = time.perf_counter()
    one.step(ids)
    if cuda:
        torch.cuda.synchronize()
        one.bytes = torch.cuda.max_memory_allocated() - resident
    if record:
        one.seconds.append(time.perf_counter() - started)


def kept_bytes(one: Contender, ids: Tensor) -> int:
    """Bytes of the tensors that a forward pass keeps, each storage once, without the model's."""
    resident = {
        t.untyped_storage().data_ptr() for t in (*one.model.parameters(), *one.model.buffers())
    }
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # its address must not be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        one.loss(ids)
    return sum(found.values())


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--method", choices=METHOD_NAMES, default="lora-xs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(shape).to(device, dtype)
        return model.requires_grad_(False)

    with tempfile.TemporaryDirectory() as cache:
        contenders = [
            ours(make, args.method, args.rank, Path(cache)),
            pefts(make, args.rank, autocast=True),
        ]
    if dtype != torch.float32:
        contenders.append(pefts(make, args.rank, autocast=False))
    ids = torch.randint(0, shape.vocab_size, (args.batch, args.length), device=device)
    for round_number in range(args.rounds + 2):
        for one in contenders:
            measure(one, ids, record=round_number >= 2)
    if device.type == "cpu":
        for one in contenders:
            one.bytes = kept_bytes(one, ids)
    mine, *rivals = contenders
    for one in contenders:
        median = statistics.median(one.seconds)
        print(f"{one.name:32} {1e3 * median:9.2f} ms a step  {one.bytes / 2**20:9.1f} MiB")
    ratios = {
        rival.name: {
            # Round by round: what slowed one down slowed the other.
            "time": round(
                statistics.median(a / b for a, b in zip(mine.seconds, rival.seconds, strict=True)),
                4,
            ),
            "memory": round(mine.bytes / rival.bytes, 4),
        }
        for rival in rivals
    }
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(
        json.dumps({"method": args.method, "device": where, "options": vars(args), "over": ratios})
    )


if __name__ == "__main__":
    main()
