"""``shoal bench serve``: plan a load, drive a running server with it, report.

Needs only the server's URL; everything it knows of the server it learns over HTTP.
"""

import argparse
import asyncio
import fnmatch
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import httpx

from shoal.loadtests.client import (
    ClientOptions,
    ServerError,
    connect,
    drive,
    list_models,
    prompt_vocabulary,
)
from shoal.loadtests.many_clients import drive_apart
from shoal.loadtests.measuring import positive
from shoal.loadtests.report import last_line, record, save, table
from shoal.loadtests.stats import Sample
from shoal.loadtests.uploads import UploadFigures, adapter_folders, upload_all
from shoal.loadtests.workload import Lengths, NameRange, Workload, plan_requests

OBJECTIVES = ("ttft", "tpot", "e2el")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags; names follow ``vllm bench serve`` where it has the same thing."""
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="server under test")
    add("--api-key", help="bearer token, if the server wants one")
    add("--upload", type=Path, metavar="DIR",
        help="first upload each adapter folder in DIR under the folder's name")  # fmt: skip
    add("--adapters", default="", metavar="PATTERN,...",
        help="adapter names or globs to draw from, e.g. 'load-*'; empty is base only")  # fmt: skip
    add("--adapter-range", type=_names, metavar="FIRST:LAST",
        help="draw from names that count up, e.g. u0000000:u0999999")  # fmt: skip
    add("--max-adapters", type=int, help="use only the first N adapters that match")
    add("--popularity", choices=("uniform", "zipf", "each", "one"), default="uniform",
        help="how an adapter is drawn for a request")  # fmt: skip
    add("--zipf-alpha", type=float, default=1.0, help="exponent for --popularity zipf")
    add("--base-share", type=float, default=0.0, help="share of requests that use the base")
    add("--num-prompts", type=int, default=64, help="requests in all")
    add("--request-rate", type=float, help="mean arrivals per second; default: all at once")
    add("--burstiness", type=float, default=1.0, help="1 is Poisson, below 1 burstier")
    add("--client-processes", type=positive, default=1,
        help="that send and read; one reads some 10,000 tokens a second")  # fmt: skip
    add("--max-concurrency", type=int, help="requests in flight at most; default: open loop")
    add("--input-len", type=_lengths, default="32", metavar="N|A:B",
        help="prompt tokens, fixed or uniform in A..B")  # fmt: skip
    add("--output-len", type=_lengths, default="64", metavar="N|A:B",
        help="output tokens, fixed or uniform in A..B")  # fmt: skip
    add("--shared-prefix-len", type=int, default=0, help="prompt tokens all requests share")
    add("--temperature", type=float, default=0.0)
    add("--respect-eos", action="store_true", help="let answers end early")
    add("--goodput", nargs="*", default=[], metavar="NAME:MS",
        help=f"count requests that meet all of these; names: {', '.join(OBJECTIVES)}")  # fmt: skip
    add("--seed", type=int, default=0, help="same seed, same requests")
    add("--warmup", type=int, default=1, help="requests sent and discarded first")
    add("--save-dir", type=Path, help="write summary JSON, per-request JSONL and a PNG here")
    add("--name", default="serve", help="file name stem for --save-dir")


def run(args: argparse.Namespace) -> int:
    """Run the load; returns 0 if every request completed, 1 otherwise."""
    try:
        workload = _workload(args)
        objectives = _objectives(args.goodput)
        if args.save_dir:  # now, and not when the run is over and would be lost
            _make_folder(args.save_dir)
        folders = adapter_folders(args.upload) if args.upload else []
        return asyncio.run(_run(args, workload, objectives, folders))
    except (ValueError, ServerError, httpx.HTTPError) as problem:
        print(f"error: {args.base_url}: {problem}", file=sys.stderr)
        return 2


async def _run(
    args: argparse.Namespace,
    workload: Workload,
    objectives: dict[str, float],
    folders: Sequence[Path],
) -> int:
    from tqdm import tqdm  # not above: the offline benchmark does without it

    uploads: UploadFigures | None = None
    async with connect(args.base_url, args.api_key) as client:
        if folders:
            with tqdm(total=len(folders), unit="adapter", file=sys.stderr, disable=None) as bar:
                uploads = await upload_all(client, folders, bar.update)
            print(uploads)
        adapters: Sequence[str]
        if args.adapter_range:  # without listing them: there may be a million
            base, *names = await list_models(client, most=1)
            adapters = args.adapter_range
        else:
            base, *names = await list_models(client)
            adapters = match_adapters(names, args.adapters, args.max_adapters)
        vocabulary = await prompt_vocabulary(client, base)
        planned = plan_requests(workload, adapters=adapters, token_ids=vocabulary, seed=args.seed)
        options = ClientOptions(
            base_url=args.base_url,
            base_model=base,
            api_key=args.api_key,
            ignore_eos=not args.respect_eos,
            temperature=args.temperature,
            max_concurrency=args.max_concurrency,
        )
        if args.warmup:
            await drive(client, options, planned[: args.warmup])
        with tqdm(total=len(planned), unit="req", file=sys.stderr, disable=None) as bar:
            if args.client_processes == 1:
                samples = await drive(client, options, planned, lambda _: bar.update())
            else:
                samples = await asyncio.to_thread(
                    drive_apart, args.client_processes, options, planned, bar.update
                )
    used = len({request.adapter for request in planned} - {None})
    load = asdict(workload)
    conditions = {
        # Named apart from the tokens that were counted, which the summary calls *_tokens.
        "input_len": load.pop("input_tokens"),
        "output_len": load.pop("output_tokens"),
        **load,
        "base_url": args.base_url,
        "model": base,
        "adapters_used": used,
        "adapters_registered": len(args.adapter_range or names),
        "uploads": asdict(uploads) if uploads else None,
        "max_concurrency": args.max_concurrency,
        "client_processes": args.client_processes,
        "seed": args.seed,
        "machine": f"{platform.machine()} {platform.system()}",
    }
    return _report(args, samples, conditions, objectives)


def _report(
    args: argparse.Namespace,
    samples: Sequence[Sample],
    conditions: dict[str, object],
    objectives: dict[str, float],
) -> int:
    full = record(samples, conditions, objectives)
    print(table(samples))
    for error in sorted({s.error for s in samples if s.error}):
        print(f"error: {error}", file=sys.stderr)
    if args.save_dir:
        paths = save(args.save_dir, samples, full, args.name)
        print("saved " + ", ".join(map(str, paths)), file=sys.stderr)
    print(last_line(full))
    return 0 if full["overall"]["failed"] == 0 else 1


def match_adapters(names: Sequence[str], patterns: str, limit: int | None) -> list[str]:
    """Names that match any of the comma-separated globs, in the server's order.

    Raises:
        ValueError: a pattern matches nothing.
    """
    chosen: set[str] = set()
    for pattern in filter(None, patterns.split(",")):
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(f"--adapters {pattern!r} matches none of {len(names)} adapters")
        chosen.update(matched)
    return [name for name in names if name in chosen][:limit]


def _workload(args: argparse.Namespace) -> Workload:
    return Workload(
        num_requests=args.num_prompts,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        input_tokens=args.input_len,
        output_tokens=args.output_len,
        shared_prefix_tokens=args.shared_prefix_len,
        popularity=args.popularity,
        zipf_alpha=args.zipf_alpha,
        base_share=args.base_share,
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(f"--save-dir cannot be used: {problem}") from problem


def _lengths(text: str) -> Lengths:
    low, _, high = text.partition(":")
    try:
        return Lengths(minimum=int(low), maximum=int(high or low))
    except ValueError as problem:
        rule = f"{text!r} must be N or A:B with 1 <= A <= B"
        raise argparse.ArgumentTypeError(rule) from problem


def _names(text: str) -> NameRange:
    try:
        return NameRange.parse(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


def _objectives(items: Sequence[str]) -> dict[str, float]:
    found = {}
    for item in items:
        name, _, limit = item.partition(":")
        if name not in OBJECTIVES or not limit:
            raise ValueError(f"--goodput {item!r} must be NAME:MS with NAME in {OBJECTIVES}")
        found[name] = float(limit)
    return found
