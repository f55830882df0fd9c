"""No step of a server that has started waits for the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_start_up_meets_every_kernel_variant_that_steps_launch(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # Triton decides when it is imported whether it interprets.
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernel_variants.py"))],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
