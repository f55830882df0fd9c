"""``shoal env``: what a bug report needs to say about the machine, as ``key: value`` lines."""

import argparse
import importlib.metadata
import os
import platform
import sys

import shoal

PACKAGES = (
    "torch",
    "triton",
    "xformers",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "fastapi",
    "uvicorn",
    "pydantic",
    "sqlalchemy",
    "numpy",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No flags."""


def run(args: argparse.Namespace) -> int:
    for key, value in report().items():
        print(f"{key}: {value}")
    return 0


def report() -> dict[str, str]:
    """Versions and hardware; contains no names, paths or environment variables of the user."""
    found = {
        "shoal": shoal.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | _devices()


def _devices() -> dict[str, str]:
    import torch

    found = {"torch threads": str(torch.get_num_threads()), "cuda": str(torch.version.cuda)}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = (
            f"{device.name}, {device.total_memory / 2**30:.1f} GiB, "
            f"capability {device.major}.{device.minor}"
        )
    return found
