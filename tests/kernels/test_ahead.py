"""Kernels compiled at once and not launched: without a GPU, so a launch would be an error."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from shoal.kernels.ahead import compiling_ahead

loaded = []

class Utils:
    def load_binary(self, name, binary, shared, device):
        loaded.append(name)
        return object(), object(), 0, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 17}

class Driver:  # an H100 that cannot be launched on
    utils = Utils()
    def launcher_cls(self, source, metadata):
        return None
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver())

@triton.jit
def double(x_ptr, SIZE: tl.constexpr, WRONG: tl.constexpr):
    at = x_ptr + tl.arange(0, SIZE)
    if WRONG:
        tl.store(at, tl.load(no_such_thing))
    tl.store(at, tl.load(at) * 2)

def kernels():
    return [type(kernel).__name__ for kernel in double.device_caches[0][0].values()]

x = torch.ones(256)
with compiling_ahead(2) as ahead:
    assert ahead
    for size in (64, 128, 64, 256, 128):
        double[(1,)](x, SIZE=size, WRONG=False)
    double[(1,)](x, SIZE=64, WRONG=False, num_warps=4)  # as it is where nothing is said
    assert len(kernels()) == 4
    assert "CompiledKernel" not in kernels()
assert kernels() == ["CompiledKernel"] * 4, kernels()
assert len(loaded) == 3
assert x.eq(1).all()
with compiling_ahead(2):
    pass

try:
    with compiling_ahead(2):
        double[(1,)](x, SIZE=64, WRONG=True)
except triton.CompilationError as error:
    assert "no_such_thing" in str(error)
else:
    sys.exit("a kernel that does not compile is not reported")
try:
    double[(1,)](x, SIZE=64, WRONG=True)
except (RuntimeError, triton.CompilationError):
    pass
else:
    sys.exit("a kernel that did not compile is silently not launched")
"""


def test_launches_are_compiled_all_at_once_and_not_launched(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "script.py"  # a kernel's source must be in a file
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
