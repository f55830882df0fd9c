"""``shoal bench pauses``: do uploads hold up the streams of a running server?

Each round listens to the same number of streams twice: for a while without uploads, then with
them. What a stream may be silent for is told in median steps of the run without.
"""

import argparse
import asyncio
import gc
import json
import multiprocessing
import platform
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from shoal.loadtests.client import ServerError, connect, list_models, prompt_vocabulary
from shoal.loadtests.measuring import positive, say
from shoal.loadtests.stats import percentile
from shoal.loadtests.steady_uploads import (
    UploadPlan,
    UploadsDone,
    delete_in_process,
    in_process,
)
from shoal.loadtests.streams import Stream
from shoal.loadtests.uploads import FILES, adapter_folders
from shoal.loadtests.variants import variant

# Streams get this long to begin, in steps that carry all their prompts.
BEGIN_S = 120.0
# After all have begun: what the beginning left behind.
SETTLE_S = 2.0
STEPS_ALLOWED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("adapters", type=Path, metavar="DIR",
        help="folder of adapter folders, of which the uploads are variants, in turns")  # fmt: skip
    add("--base-url", default="http://127.0.0.1:8000", help="server under test")
    add("--api-key", help="bearer token, if the server wants one")
    add("--streams", type=positive, default=64, help="listening all the time")
    add("--base-streams", action="store_true",
        help="streams ask the base; default: each an adapter of its own")  # fmt: skip
    add("--rate", type=float, default=10.0, help="uploads a second")
    add("--seconds", type=float, default=60.0, help="of uploads in a round")
    add("--calm-seconds", type=float, default=20.0, help="without uploads in a round")
    add("--rounds", type=positive, default=1, help="of both runs, in turns")
    add("--no-use", action="store_true", help="do not use what was uploaded")
    add("--input-len", type=positive, default=8, help="prompt tokens of a stream")
    add("--output-len", type=positive, default=1024,
        help="tokens of one answer, on the average: streams differ by up to 30 %%, so that they "
        "do not ask again at one time")  # fmt: skip
    add("--keep", action="store_true", help="do not delete what was uploaded")


def run(args: argparse.Namespace) -> int:
    """Measure; returns 0, 1 if an upload or a stream failed, or 2 when nothing was measured."""
    try:
        if args.rate <= 0 or args.seconds <= 0 or args.calm_seconds <= 0:
            raise ValueError("--rate, --seconds and --calm-seconds must be above 0")
        folders = tuple(adapter_folders(args.adapters))
        sizes = []
        for folder in folders:
            files = {name: (folder / name).read_bytes() for name in FILES}
            variant(files, 0)
            sizes.append(sum(map(len, files.values())))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            return asyncio.run(_Bench(args, folders, sizes[0], process).run())
    except (ValueError, ServerError, httpx.HTTPError) as problem:
        print(f"error: {args.base_url}: {problem}", file=sys.stderr)
        return 2


@dataclass(frozen=True, slots=True)
class Gaps:
    """How long streams were silent between tokens, in ms.

    Attributes:
        count: of gaps.
        median: the step, as clients see it.
    """

    count: int
    median: float
    p99: float
    p999: float
    worst: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Gaps":
        """Raises ValueError without any."""
        if not seconds:
            raise ValueError("no stream received two tokens in that time")
        ordered = sorted(gap * 1e3 for gap in seconds)
        return cls(
            len(ordered),
            statistics.median(ordered),
            percentile(ordered, 0.99),
            percentile(ordered, 0.999),
            ordered[-1],
        )

    def as_json(self) -> dict[str, float]:
        """Rounded to microseconds."""
        return {name: round(getattr(self, name), 3) for name in self.__dataclass_fields__}


class _Bench:
    """The rounds of one run."""

    def __init__(
        self,
        args: argparse.Namespace,
        folders: tuple[Path, ...],
        upload_bytes: int,
        process: ProcessPoolExecutor,
    ) -> None:
        self._args = args
        self._folders = folders
        self._upload_bytes = upload_bytes
        self._process = process
        self._next = secrets.randbits(32)
        self._prefix = f"pause-{secrets.token_hex(3)}-"
        self._uploaded: list[str] = []
        self._prompt: list[int] = []

    async def run(self) -> int:
        args = self._args
        async with connect(args.base_url, args.api_key) as client:
            base, *_ = await list_models(client)
            vocabulary = await prompt_vocabulary(client, base)
        self._prompt = (vocabulary * args.input_len)[: args.input_len]
        models = [base] * args.streams
        try:
            # Also what starts the process, and whatever the server does only once.
            first = await self._upload(args.streams, use=True)
            if first.failed:
                raise ServerError("; ".join(first.errors))
            if not args.base_streams:
                models = first.names
            rounds = []
            for number in range(args.rounds):
                calm, _, failed = await self._listen(models, args.calm_seconds)
                busy, uploads, more = await self._listen(
                    models,
                    args.seconds,
                    lambda begin: self._upload(
                        max(1, round(args.rate * args.seconds)),
                        begin=begin,
                        rate=args.rate,
                        use=not args.no_use,
                    ),
                )
                assert uploads is not None
                rounds.append(_round(calm, busy, uploads, failed + more))
                say(_round_line(number, rounds[-1]))
        finally:
            if not args.keep and self._uploaded:
                await self._call(
                    delete_in_process, args.base_url, args.api_key, tuple(self._uploaded)
                )
        return self._report(base, rounds)

    async def _upload(
        self, count: int, *, begin: float = 0.0, rate: float = 0.0, use: bool
    ) -> UploadsDone:
        args = self._args
        plan = UploadPlan(
            base_url=args.base_url,
            api_key=args.api_key,
            folders=self._folders,
            prefix=self._prefix,
            first=self._next,
            count=count,
            begin_s=begin,
            rate=rate,
            prompt=self._prompt[:1] if use else (),
        )
        self._next += count
        done: UploadsDone = await self._call(in_process, plan)
        self._uploaded += done.names
        return done

    async def _call(self, function: Callable[..., Any], *values: object) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._process, function, *values)

    async def _listen(
        self,
        models: Sequence[str],
        seconds: float,
        upload: Callable[[float], Any] | None = None,
    ) -> tuple[Gaps, UploadsDone | None, list[str]]:
        """All streams for that long; what failed."""
        args = self._args
        streams = [
            Stream(model, self._prompt, spread(args.output_len, index, len(models)))
            for index, model in enumerate(models)
        ]
        # A collection here would look like a pause of the server's.
        gc.collect()
        gc.freeze()
        tasks = [asyncio.create_task(each.listen(args.base_url, args.api_key)) for each in streams]
        try:
            await _begun(streams)
            await asyncio.sleep(SETTLE_S)
            begin = time.monotonic()
            uploading = asyncio.ensure_future(upload(begin)) if upload else None
            await asyncio.sleep(seconds)
            end = time.monotonic()
            done = await uploading if uploading else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        gaps = Gaps.of([gap for each in streams for gap in each.gaps(begin, end)])
        return gaps, done, [each.error for each in streams if each.error]

    def _report(self, base: str, rounds: Sequence[dict[str, Any]]) -> int:
        args = self._args
        worst = max(each["ratio"] for each in rounds)
        failed = sum(each["failed"] for each in rounds)
        print(_table(rounds))
        verdict = "within" if worst <= STEPS_ALLOWED else "above"
        print(f"worst pause beside uploads: {worst:.2f} median steps, {verdict} {STEPS_ALLOWED}")
        for text in sorted({text for each in rounds for text in each["errors"]}):
            print(f"error: {text}", file=sys.stderr)
        conditions = {
            "base_url": args.base_url,
            "model": base,
            "streams": args.streams,
            "base_streams": args.base_streams,
            "rate": args.rate,
            "seconds": args.seconds,
            "calm_seconds": args.calm_seconds,
            "use": not args.no_use,
            "upload_bytes": self._upload_bytes,
            "machine": f"{platform.machine()} {platform.system()}",
        }
        print(json.dumps({"bench": "pauses", **conditions, "worst_ratio": worst, "rounds": rounds}))
        return 1 if failed else 0


def spread(tokens: int, index: int, count: int) -> int:
    """From 0.7 to 1.3 of ``tokens``, evenly."""
    return max(1, round(tokens * (0.7 + 0.6 * (index + 0.5) / count)))


async def _begun(streams: Sequence[Stream]) -> None:
    """Every stream has received something.

    Raises:
        ServerError: one failed, or it took too long.
    """
    deadline = time.monotonic() + BEGIN_S
    while not all(any(each.answers[-1:]) for each in streams):
        for each in streams:
            if each.error:
                raise ServerError(each.error)
        if time.monotonic() > deadline:
            raise ServerError(f"not every stream had begun after {BEGIN_S:.0f} s")
        await asyncio.sleep(0.05)


def _round(
    calm: Gaps, busy: Gaps, uploads: UploadsDone, stream_errors: Sequence[str]
) -> dict[str, Any]:
    """What one round showed."""
    taken = sorted(uploads.upload_ms)
    used = sorted(uploads.use_ms)
    return {
        "calm_ms": calm.as_json(),
        "busy_ms": busy.as_json(),
        "calm_ratio": round(calm.worst / calm.median, 3),
        "ratio": round(busy.worst / calm.median, 3),
        "uploads": len(taken),
        "usable": uploads.usable,
        "per_s": round(len(taken) / uploads.seconds, 2) if uploads.seconds else 0.0,
        "upload_ms": _figures(taken),
        "use_ms": _figures(used),
        "failed": uploads.failed + len(stream_errors),
        "errors": [*uploads.errors, *stream_errors],
    }


def _figures(ordered: Sequence[float]) -> dict[str, float]:
    if not ordered:
        return {}
    quantiles = {"p50": 0.5, "p99": 0.99, "worst": 1.0}
    return {name: round(percentile(ordered, q), 1) for name, q in quantiles.items()}


def _round_line(number: int, found: dict[str, Any]) -> str:
    return (
        f"round {number + 1}: step {found['calm_ms']['median']:.1f} ms, worst "
        f"{found['calm_ratio']:.2f} of them without uploads, {found['ratio']:.2f} beside "
        f"{found['uploads']} uploads at {found['per_s']:.1f} a second"
    )


def _table(rounds: Sequence[dict[str, Any]]) -> str:
    head = (
        f"{'run':<16} {'gaps':>7} {'median':>8} {'p99':>8} {'p99.9':>8} {'worst':>8} {'ratio':>6}"
    )
    lines = [f"{head}   ms between tokens; ratio to the median without uploads"]
    for number, found in enumerate(rounds):
        for name, ratio in (("calm", "calm_ratio"), ("busy", "ratio")):
            ms = found[f"{name}_ms"]
            label = f"{number + 1} {'uploads' if name == 'busy' else 'no uploads'}"
            lines.append(
                f"{label:<16} {ms['count']:>7} {ms['median']:>8.1f} {ms['p99']:>8.1f} "
                f"{ms['p999']:>8.1f} {ms['worst']:>8.1f} {found[ratio]:>6.2f}"
            )
        taken, used = found["upload_ms"], found["use_ms"]
        line = f"{number + 1} {found['uploads']} uploads, {found['per_s']:.1f} a second"
        if taken:
            line += f", ms p50/p99/worst {taken['p50']:.0f}/{taken['p99']:.0f}/{taken['worst']:.0f}"
        if used:
            line += (
                f"; {found['usable']} usable on their 201, first answer "
                f"{used['p50']:.0f}/{used['p99']:.0f}/{used['worst']:.0f}"
            )
        lines.append(line)
    return "\n".join(lines)
