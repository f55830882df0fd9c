"""``make bench``: one run that compares adapters with the base, and shoal with transformers.

Starts a server on a free port with its own registry and registers ``--registered`` adapters over
HTTP (variants of a shipped LoRA-XS, or of ``--template``, so their sizes and targets are real).
Then it alternates the same load on the base and on as many different adapters as there are
streams. Afterwards, with the server gone, ``transformers.generate`` answers some of the same
requests one after the other.

Only ratios of one run mean anything: both sides see the same machine at the same time.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from shoal.loadtests.client import ClientOptions, connect, drive, list_models, prompt_vocabulary
from shoal.loadtests.report import table
from shoal.loadtests.stats import Sample, summarise
from shoal.loadtests.workload import Lengths, PlannedRequest, Workload, plan_requests

SHIPPED = Path(__file__).resolve().parent.parent / "adapters" / "shipped" / "smollm2"
# What training changes in each family; a LoRA-XS probe or frozen factor must stay as it is.
TRAINED = ("lora_latent_mapping.weight", "miss_block", "lora_B.weight")
READY = re.compile(r"http://[\w.:\[\]-]+:\d+")
START_TIMEOUT_S = 600.0


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder), args.serve_args) as url:
        rounds, planned, samples = asyncio.run(_measure(url, args))
    serial = serial_transformers(planned[: args.serial_requests], args)
    base = statistics.median(rounds["base"])
    adapters = statistics.median(rounds["adapters"])
    print(table(samples))
    print()
    print(f"{'what':<52} {'tok/s':>8}")
    print(f"{'base, ' + str(args.streams) + ' streams':<52} {base:>8.1f}")
    print(f"{f'{args.streams} streams, {args.streams} adapters of {args.registered}':<52} "
          f"{adapters:>8.1f}   {adapters / base:.2f} x base (goal 0.80)")  # fmt: skip
    print(f"{'transformers.generate, one request after another':<52} {serial:>8.1f}   "
          f"shoal with adapters is {adapters / serial:.1f} x that (goal 5)")  # fmt: skip
    print(
        json.dumps(
            {
                "bench": "compare",
                "streams": args.streams,
                "registered": args.registered,
                "input": args.input_len,
                "output": args.output_len,
                "base_tok_s": rounds["base"],
                "adapters_tok_s": rounds["adapters"],
                "adapters_over_base": adapters / base,
                "transformers_serial_tok_s": serial,
                "adapters_over_transformers": adapters / serial,
                "cpus": len(os.sched_getaffinity(0)),
                "machine": platform.machine(),
                "cpu": _cpu_name(),
            }
        )
    )
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m shoal.loadtests.compare", description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serial-requests", type=int, default=4)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--template",
        type=Path,
        default=SHIPPED / "pirate",
        help="adapter directory to make variants of; default: a LoRA-XS of rank 8",
    )
    parser.add_argument("serve_args", nargs="*", help="after --: passed to shoal serve")
    return parser.parse_args(argv)


async def _measure(
    url: str, args: argparse.Namespace
) -> tuple[dict[str, list[float]], list[PlannedRequest], list[Sample]]:
    """Register the adapters, then alternate base and adapter rounds."""
    async with connect(url, None) as client:
        base, *_ = await list_models(client)
        names = await _register(client, args.template, args.registered)
        vocabulary = await prompt_vocabulary(client, base)
        workload = Workload(
            num_requests=args.streams,
            input_tokens=Lengths(minimum=args.input_len, maximum=args.input_len),
            output_tokens=Lengths(minimum=args.output_len, maximum=args.output_len),
            popularity="each",
        )
        options = ClientOptions(base_url=url, base_model=base)
        rounds: dict[str, list[float]] = {"base": [], "adapters": []}
        last: list[Sample] = []
        for number in range(-1, args.rounds):  # round -1 warms up and is not counted
            for side, adapters in (("base", []), ("adapters", names)):
                # A new seed for each round: prompts must not come out of the prefix cache.
                planned = plan_requests(
                    workload, adapters=adapters, token_ids=vocabulary, seed=1000 + number
                )
                samples = await drive(client, options, planned)
                failed = [s.error for s in samples if s.error]
                if failed:
                    raise SystemExit(f"error: {len(failed)} requests failed: {failed[0]}")
                rate = summarise(samples).output_tok_s
                print(f"round {number} {side}: {rate:.1f} tok/s", file=sys.stderr)
                if number >= 0:
                    rounds[side].append(rate)
                last = samples
        return rounds, planned, last


async def _register(client: httpx.AsyncClient, template: Path, count: int) -> list[str]:
    """Upload ``count`` variants of an adapter; returns their names."""
    names = [f"load-{index:05d}" for index in range(count)]
    config = (template / "adapter_config.json").read_bytes()
    gate = asyncio.Semaphore(8)
    start = time.perf_counter()

    async def one(index: int) -> None:
        async with gate:
            answer = await client.post(
                "/v1/adapters",
                data={"name": names[index]},
                files=[
                    ("file", ("adapter_config.json", config)),
                    ("file", ("adapter_model.safetensors", variant(template, index))),
                ],
            )
        if answer.status_code != 201:
            raise SystemExit(f"error: upload answered {answer.status_code}: {answer.text[:300]}")
        bar.update()

    with tqdm(total=count, unit="adapter", desc="registering", disable=None) as bar:
        await asyncio.gather(*(one(index) for index in range(count)))
    rate = count / (time.perf_counter() - start)
    print(f"registered {count} adapters, {rate:.0f} per second", file=sys.stderr)
    return names


def variant(template: Path, index: int) -> bytes:
    """The template's safetensors with its trained matrices changed by about 5 %, seeded."""
    import torch
    from safetensors.torch import load_file, save

    tensors = load_file(template / "adapter_model.safetensors")
    noise = torch.Generator().manual_seed(index)
    for name in sorted(tensors):
        if name.endswith(TRAINED):
            matrix = tensors[name]
            spread = 0.05 * matrix.float().std()
            drawn = torch.randn(matrix.shape, generator=noise) * spread
            tensors[name] = (matrix + drawn.to(matrix.dtype)).contiguous()
    return bytes(save(tensors, metadata={"format": "pt"}))


def serial_transformers(planned: Sequence[PlannedRequest], args: argparse.Namespace) -> float:
    """Output tokens/s of ``transformers.generate`` on the base, fp32, one request at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from shoal.server.model.pull import resolve_model

    path = resolve_model(args.model)
    where: dict[str, Any] = (
        {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        if path.suffix == ".gguf"
        else {"pretrained_model_name_or_path": path}
    )
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    def generate(request: PlannedRequest, tokens: int) -> int:
        prompt = torch.tensor([request.prompt_ids])
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return int(out.shape[1]) - prompt.shape[1]

    generate(planned[0], 4)
    start = time.perf_counter()
    received = sum(generate(request, request.max_tokens) for request in planned)
    return received / (time.perf_counter() - start)


@contextmanager
def _server(folder: Path, extra: Sequence[str]) -> Iterator[str]:
    """A server of our own on a free port; yields its URL, stops it by its process id."""
    log = folder / "server.log"
    command = [
        sys.executable, "-m", "shoal.server", "serve", "--port", "0",
        "--registry", f"sqlite:///{folder / 'registry.db'}", *extra,
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield _wait_until_ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(
                f"error: the server ended with {process.returncode}\n{log.read_text()}"
            )
        for url in READY.findall(log.read_text()):
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    return str(url)
            except httpx.HTTPError:
                pass
        time.sleep(0.2)
    raise SystemExit(f"error: the server was not ready in {START_TIMEOUT_S:.0f} s")


def _cpu_name() -> str:
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
