"""``sample_tokens``: from a step's logits to its token ids, inside a CUDA graph.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernels. ``launch_sample_tokens`` always launches; on CPU
tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.launching import FLOATS, power_of_two, require_triton
from shoal.kernels.sample_tokens.reference import sample_tokens_reference

# By how many bits the float32 image of a logit can be shortened and still be exact.
SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
GROUP = 8192  # tokens whose mass is added up together where a row is filtered


@dataclass(frozen=True, slots=True)
class SampleConfig:
    """How to launch.

    Attributes:
        chunk: logits a program of the scan takes at a time.
        span: chunks per program of the scan; None: by the number of rows.
        scan_warps: of a program of the scan.
        block: logits a row's program takes at a time where it draws; divides ``GROUP``.
        pick_warps: of that program; one warp does where every row is greedy.
        pick_registers: of each of its threads at most; 64 let two programs of 16 warps share an
            H100's multiprocessor, for 32 bytes spilled outside the loops over the row.

    Only ``span`` leaves the order of every sum as it is, so only it may depend on the batch.
    """

    chunk: int = 2048
    span: int | None = None
    scan_warps: int = 4
    block: int = 4096
    pick_warps: int = 16
    pick_registers: int = 64


def sample_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    scale: Tensor | None = None,
    softcap: float | None = None,
    greedy_only: bool = False,
    out: Tensor | None = None,
    config: SampleConfig | None = None,
) -> Tensor:
    """One token per row: the argmax, or a draw after temperature, top-k, top-p and min-p.

    Greedy is the largest logit, the lowest index among equals. Otherwise the probabilities are
    softmax(logit / temperature). Top-k keeps the k largest logits; top-p, on what top-k left and
    renormalised, keeps them in descending order until the mass before one reaches ``top_p`` (the
    one that crosses is kept); among equal logits both keep the lowest indices. min-p then keeps
    ``p >= min_p · p_max``. The most probable token always stays. ``uniform`` is looked up in the
    cumulative probabilities of the kept tokens *in vocabulary order*. A row's token does not
    depend on the other rows, to the last bit.

    Args:
        logits: ``(rows, vocab)`` float32, float16 or bfloat16; not modified. Rows may be strided.
        temperature: ``(rows,)`` float32; ``TEMPERATURE_MIN`` or less is greedy.
        top_k: ``(rows,)`` int32; 0 is off, as is anything from the vocabulary's size on.
        top_p: ``(rows,)`` float32; 1 is off.
        min_p: ``(rows,)`` float32; 0 is off.
        uniform: ``(rows,)`` float64, ``0 <= u < 1``.
        scale: ``(rows,)`` float32 above 0 that multiplies the logits (1/rms of the final norm).
        softcap: c of ``c·tanh(logit/c)``, after the scale; -inf stays -inf.
        greedy_only: a promise that every row is greedy, known when it compiles; the row's
            parameters are then not read.
        out: ``(rows,)`` int64 to write to; default newly allocated.
        config: launch parameters, for measurements.

    Returns:
        ``(rows,)`` int64; -1 where a row holds a NaN or +inf or no finite value, or its scale is
        not a number above 0.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Nothing depends on values on the host: a call can be captured in a CUDA graph. Two launches.

    Cost: greedy reads ``rows·vocab`` logits once, memory bound. A draw reads its row's again from
    cache; each filter other than min-p adds a pass per two bits of the range it searches, about 4
    to 8 for 16-bit logits, and any filter adds one more.
    """
    parameters = (temperature, top_k, top_p, min_p, uniform, scale)
    _check(logits, *parameters, softcap, out)
    if logits.device.type != "cpu":
        return _launch(logits, *parameters, softcap, greedy_only, out, config)
    tokens = sample_tokens_reference(logits, *parameters, softcap, greedy_only)
    return tokens if out is None else out.copy_(tokens)


def launch_sample_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    scale: Tensor | None = None,
    softcap: float | None = None,
    greedy_only: bool = False,
    out: Tensor | None = None,
    config: SampleConfig | None = None,
) -> Tensor:
    """``sample_tokens`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    parameters = (temperature, top_k, top_p, min_p, uniform, scale)
    _check(logits, *parameters, softcap, out)
    return _launch(logits, *parameters, softcap, greedy_only, out, config)


def default_span(rows: int, chunks: int) -> int:
    """Chunks per program of the scan."""
    # Not swept yet. An H100 holds some 1200 programs at once; a few times as many keep its end
    # short. 256 rows of 128,256 logits are 16 programs a row, up to 64 rows one per chunk.
    return max(1, -(-rows * chunks // 4096))


def _check(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    scale: Tensor | None,
    softcap: float | None,
    out: Tensor | None,
) -> None:
    check_matrix("logits", logits, FLOATS)
    rows, vocab = logits.shape
    if vocab == 0:
        raise ShapeError("logits", "at least one column", tuple(logits.shape))
    check_vector("temperature", temperature, (torch.float32,), rows)
    check_vector("top_k", top_k, (torch.int32,), rows)
    check_vector("top_p", top_p, (torch.float32,), rows)
    check_vector("min_p", min_p, (torch.float32,), rows)
    check_vector("uniform", uniform, (torch.float64,), rows)
    if scale is not None:
        check_vector("scale", scale, (torch.float32,), rows)
    if softcap is not None and not softcap > 0:
        raise ShapeError("softcap", "a number above 0", softcap)
    if out is not None:
        check_vector("out", out, (torch.int64,), rows)
    check_devices(
        {
            "logits": logits,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "uniform": uniform,
            "scale": scale,
            "out": out,
        }
    )


def _launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    scale: Tensor | None,
    softcap: float | None,
    greedy_only: bool,
    out: Tensor | None,
    config: SampleConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.sample_tokens.jit import sample_pick_kernel, sample_scan_kernel

    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    if rows == 0:
        return tokens
    chosen = config or SampleConfig()
    chunks = -(-vocab // chosen.chunk)
    span = chosen.span or default_span(rows, chunks)
    parts = -(-chunks // span)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    kept = (0, 0) if greedy_only else (rows, chunks)
    chunk_max = torch.empty(kept, dtype=torch.float32, device=logits.device)
    chunk_sum = torch.empty(kept, dtype=torch.float32, device=logits.device)
    shared = {
        "logits_ptr": logits,
        "temperature_ptr": temperature,
        "scale_ptr": scale,
        "best_ptr": best,
        "index_ptr": index,
        "chunk_max_ptr": chunk_max,
        "chunk_sum_ptr": chunk_sum,
        "vocab": vocab,
        "chunks": chunks,
        "row_stride": logits.stride(0),
        "softcap": 0.0 if softcap is None else float(softcap),
        "CHUNK": chosen.chunk,
        "GREEDY_ONLY": greedy_only,
        "SOFTCAP": softcap is not None,
    }
    sample_scan_kernel[(parts, rows)](**shared, span=span, num_warps=chosen.scan_warps)
    sample_pick_kernel[(rows,)](
        **shared,
        top_k_ptr=top_k,
        top_p_ptr=top_p,
        min_p_ptr=min_p,
        uniform_ptr=uniform,
        tokens_ptr=tokens,
        parts=parts,
        CHUNKS=power_of_two(chunks),
        BLOCK=chosen.block,
        GROUP=GROUP,
        GROUPS=power_of_two(-(-vocab // GROUP)),
        SHIFT=SHIFTS[logits.dtype],
        num_warps=1 if greedy_only else chosen.pick_warps,
        maxnreg=chosen.pick_registers,
    )
    return tokens
