"""All kernel benchmarks in one run: ``python -m shoal.kernels.bench_all --check --json OUT``.

Checks every op against its reference, times it, and sweeps launch variants on a GPU.
"""

from __future__ import annotations

import sys

from shoal.kernels.benching import run
from shoal.kernels.core_apply.bench import BENCH as CORE_APPLY
from shoal.kernels.fold_sum.bench import BENCH as FOLD_SUM
from shoal.kernels.grouped_matmul.bench import BENCH as GROUPED_MATMUL
from shoal.kernels.paged_attention.bench import BENCH as PAGED_ATTENTION

if __name__ == "__main__":
    sys.exit(run([CORE_APPLY, FOLD_SUM, GROUPED_MATMUL, PAGED_ATTENTION], ["--sweep", *sys.argv[1:]]))
