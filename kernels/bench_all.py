"""All kernel benchmarks in one run: ``python -m shoal.kernels.bench_all --check --json OUT``.

Checks every op against its reference, times it, and sweeps launch variants on a GPU.
"""

from __future__ import annotations

import sys

from shoal.kernels.add_residual.bench import BENCH as ADD_RESIDUAL
from shoal.kernels.add_rms_norm.bench import BENCH as ADD_RMS_NORM
from shoal.kernels.benching import run
from shoal.kernels.core_apply.bench import BENCH as CORE_APPLY
from shoal.kernels.core_project.bench import BENCH as CORE_PROJECT
from shoal.kernels.fold_sum.bench import BENCH as FOLD_SUM
from shoal.kernels.grouped_matmul.bench import BENCH as GROUPED_MATMUL
from shoal.kernels.lane_matmul.bench import BENCH as LANE_MATMUL
from shoal.kernels.lane_outer.bench import BENCH as LANE_OUTER
from shoal.kernels.paged_attention.bench import BENCH as PAGED_ATTENTION
from shoal.kernels.rope_kv.bench import BENCH as ROPE_KV
from shoal.kernels.sample_tokens.bench import BENCH as SAMPLE_TOKENS
from shoal.kernels.scale_outputs.bench import BENCH as SCALE_OUTPUTS
from shoal.kernels.silu_mul.bench import BENCH as SILU_MUL

if __name__ == "__main__":
    fused = [ADD_RESIDUAL, CORE_PROJECT, ROPE_KV, SILU_MUL, ADD_RMS_NORM]
    by_row = [CORE_APPLY, FOLD_SUM, GROUPED_MATMUL, SCALE_OUTPUTS]
    training = [LANE_MATMUL, LANE_OUTER]
    benches = [*by_row, *training, PAGED_ATTENTION, *fused, SAMPLE_TOKENS]
    sys.exit(run(benches, ["--sweep", *sys.argv[1:]]))
