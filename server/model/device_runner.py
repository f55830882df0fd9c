"""``DeviceRunner``: steps on a GPU, without the CPU in their way.

A step of decode rows alone is one replay of a CUDA graph, captured per number of rows and set of
active adapter families; which adapters, blocks and tokens it works on is in static tensors that
are rewritten before each replay. A step with prompts runs the same kernels one by one. Either way
``submit`` returns before the device is done: tokens stay on the device, where the next step finds
them by lane, and reach the host by an asynchronous copy.

On CPU tensors the same code runs without graphs, through the kernels' references: for tests.
"""

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.bank import AdapterBank
from shoal.adapters.host_tier import HostTier
from shoal.adapters.tables import ActiveFamilies, StepTables
from shoal.kernels.core_apply.epilogue import RowScale
from shoal.kernels.paged_attention.kernel import paged_decode, paged_prefill
from shoal.kernels.sample_tokens.kernel import sample_tokens
from shoal.server.engine.plan import Done, Pending, Row, StepPlan, StepResult
from shoal.server.model.decoder import Decoder
from shoal.server.model.fused import FusedForward, StepInputs, row_factors
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.sampler import Sampler, needs_host
from shoal.server.model.step_tensors import Loaded, StepTensors

log = logging.getLogger(__name__)

# Contexts up to this many positions have graphs of their own: their block tables are narrow, and
# a row's keys need not be shared by several programs.
SHORT_CONTEXT = 1024
# Steps under way at once, and one whose result is being read.
OUTPUT_RING = 4
NO_FAMILIES = ActiveFamilies()


class GraphKey(NamedTuple):
    """What a captured step depends on; everything else is in static tensors."""

    rows: int
    short: bool
    greedy: bool
    active: ActiveFamilies


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """As of the scheduler: rows and tokens of a step, tokens of a request."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


def row_buckets(most: int) -> tuple[int, ...]:
    """Row counts that have graphs: powers of two to 16, then steps that waste under a quarter."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    sizes += range(320, most + 64, 64)
    return (*(size for size in sizes if size < most), most)


class StepBackend(Protocol):
    """Makes one step's attention over the cache, such as ``XformersAttention``."""

    def __call__(
        self,
        kv: KVCache,
        *,
        block_tables: Tensor,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        num_decode_rows: int,
    ) -> Callable[[int, Tensor, float, int | None, float | None], Tensor]:
        """Rows in order, decode rows first; tables are ``(rows, widest)`` on the device."""
        ...


class _Captured(NamedTuple):
    graph: "torch.cuda.CUDAGraph"
    logits: Tensor  # (rows, vocab)
    scale: RowScale | None
    tokens: Tensor  # (rows,) int64


class DeviceRunner:
    """A ``Runner`` over a ``FusedForward``.

    Args:
        forward: the model.
        kv: its cache.
        bank: the device bank of adapters; None serves the base alone.
        host: where adapters are staged before the plan asks for them.
        limits: what the scheduler plans within.
        graphs: whether decode steps are captured; by default on CUDA.
        attention: another backend, made anew for each step from lengths on the host; then nothing
            is captured, and decode steps run as prompts do.
    """

    lookahead = True

    def __init__(
        self,
        forward: FusedForward,
        kv: KVCache,
        bank: AdapterBank | None,
        host: HostTier | None,
        *,
        limits: RunnerLimits,
        graphs: bool | None = None,
        entropy: random.Random | None = None,
        attention: StepBackend | None = None,
    ) -> None:
        self.forward = forward
        self._decoder: Decoder = forward.decoder
        self._kv = kv
        self._bank = bank
        self._host = host
        self._entropy = entropy or random.SystemRandom()
        self._sampler = Sampler(self._entropy)
        device = self._decoder.device
        self._cuda = device.type == "cuda"
        self._use_graphs = self._cuda if graphs is None else graphs
        self._attention = attention
        self._stream = (
            torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        )
        block_tokens = kv.block_tokens
        self._blocks_max = -(-limits.max_model_len // block_tokens)
        self._blocks_short = min(self._blocks_max, -(-SHORT_CONTEXT // block_tokens))

        def tensors(tokens: int) -> StepTensors:
            return StepTensors(
                max_tokens=tokens,
                max_rows=limits.max_num_seqs,
                max_blocks=self._blocks_max,
                block_tokens=block_tokens,
                device=device,
            )

        def tables(tokens: int) -> StepTables | None:
            return None if bank is None else StepTables(bank, tokens)

        self._decode, self._decode_tables = (
            tensors(limits.max_num_seqs),
            tables(limits.max_num_seqs),
        )
        self._prompt, self._prompt_tables = (
            tensors(limits.max_num_batched_tokens),
            tables(limits.max_num_batched_tokens),
        )
        self.buckets = row_buckets(limits.max_num_seqs)
        # The token that each lane sampled last; one more for padding rows.
        self._last = torch.zeros(limits.max_num_seqs + 1, dtype=torch.int64, device=device)
        self._outputs = [
            torch.zeros(limits.max_num_seqs, dtype=torch.int64, pin_memory=self._cuda)
            for _ in range(OUTPUT_RING)
        ]
        self._turn = 0
        # One for all graphs: each would keep its own, 4 GB together for 256 rows of a vocabulary of
        # 128,000. A step's are read before the next one is submitted.
        head = self._decoder.head
        self._logits = head.new_empty(limits.max_num_seqs, len(head))
        self._graphs: dict[GraphKey, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None

    # -- running ------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Pending:
        """Begin a step. See ``Runner``."""
        with self._on_stream():
            for load in plan.adapter_loads:
                assert self._bank is not None
                assert self._host is not None
                self._bank.load(load.adapter, self._host.get(load.adapter.spec.digest))
            rows = plan.rows
            decodes = all(row.sample and len(row.token_ids) == 1 for row in rows)
            if decodes and self._attention is None:
                return self._submit_decode(rows)
            return self._submit_prompts(rows)

    def _submit_decode(self, rows: Sequence[Row]) -> Pending:
        bucket = next(size for size in self.buckets if size >= len(rows))
        longest = max(row.start for row in rows) + 1
        short = longest <= self._blocks_short * self._kv.block_tokens
        loaded = self._decode.load(
            rows,
            entropy=self._entropy,
            table_blocks=self._table_blocks(short),
            padded_rows=bucket,
        )
        active = self._active(self._decode_tables, rows, bucket)
        key = GraphKey(bucket, short, loaded.greedy, active)
        captured = self._replay(key)
        return self._finish(rows, captured.logits, captured.scale, captured.tokens, self._decode)

    def _replay(self, key: GraphKey) -> _Captured:
        if not self._use_graphs:
            return self._run_decode(key)
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._capture(key)
        captured.graph.replay()
        return captured

    def _submit_prompts(self, rows: Sequence[Row]) -> Pending:
        loaded = self._prompt.load(rows, entropy=self._entropy, table_blocks=self._widest(rows))
        active = self._active(self._prompt_tables, rows, loaded.tokens)
        hidden, scale = self.forward(
            self._inputs(
                self._prompt,
                loaded.tokens,
                self._attend_rows(loaded, rows),
                self._prompt_tables,
                active,
            )
        )
        sampling = [row for row in rows if row.sample]
        if not sampling:
            return self._pending({}, None)
        at = self._prompt.device["sampled_at"][: loaded.sampled]
        if scale is not None:
            scale = replace(scale, sums=scale.sums.index_select(1, at))
        logits = F.linear(hidden.index_select(0, at), self._decoder.head)
        tokens = self._sample(self._prompt, logits, scale, loaded.greedy)
        return self._finish(sampling, logits, scale, tokens, self._prompt)

    def _active(
        self, tables: StepTables | None, rows: Sequence[Row], tokens: int
    ) -> ActiveFamilies:
        if tables is None:
            return NO_FAMILIES
        return tables.fill([(row.adapter, len(row.token_ids)) for row in rows], tokens)

    def _finish(
        self,
        rows: Sequence[Row],
        logits: Tensor,
        scale: RowScale | None,
        tokens: Tensor,
        tensors: StepTensors,
    ) -> Pending:
        """Tokens to the host, by the kernel or, where a row needs more, by the host's sampler."""
        if not any(needs_host(row) for row in rows):
            return self._pending({row.request_id: i for i, row in enumerate(rows)}, tokens)
        adjusted = self._adjusted(logits[: len(rows)], scale)
        samples = self._sampler.sample(adjusted, rows)
        result = StepResult(token_ids={})
        for i, row in enumerate(rows):
            if not samples.finite[i]:
                result.failed[row.request_id] = NOT_FINITE
                continue
            result.token_ids[row.request_id] = samples.token_ids[i]
            logprobs = samples.logprobs[i]
            if logprobs is not None:
                result.logprobs[row.request_id] = logprobs
        chosen = torch.tensor(samples.token_ids, device=logits.device)
        self._last.index_copy_(0, tensors.device["lanes"][: len(rows)], chosen)
        return Done(result)

    def _adjusted(self, logits: Tensor, scale: RowScale | None) -> Tensor:
        """Logits as the model means them: ``(rows, vocab)`` float32."""
        logits = logits.float()
        if scale is not None:
            logits = logits * row_factors(scale)[: len(logits), None]
        cap = self._decoder.config.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _pending(self, places: dict[str, int], tokens: Tensor | None) -> Pending:
        out = self._outputs[self._turn]
        self._turn = (self._turn + 1) % OUTPUT_RING
        if tokens is not None:
            out[: len(places)].copy_(tokens[: len(places)], non_blocking=True)
        done = None
        if self._cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        else:
            out = out.clone()
        return _Step(places, out, done)

    # -- the device's side ----------------------------------------------------------------------

    def _run_decode(self, key: GraphKey) -> _Captured:
        """The decode step of ``key`` over its static tensors; captured, or run as it is."""
        tensors, rows = self._decode, key.rows
        hidden, scale = self.forward(
            self._inputs(
                tensors,
                rows,
                self._attend_decode(tensors, rows, self._table_blocks(key.short)),
                self._decode_tables,
                key.active,
            )
        )
        logits = self._logits[:rows]
        torch.mm(hidden, self._decoder.head.t(), out=logits)
        tokens = self._sample(tensors, logits, scale, key.greedy)
        return _Captured(None, logits, scale, tokens)  # type: ignore[arg-type]

    def _inputs(
        self,
        tensors: StepTensors,
        tokens: int,
        attend: Callable[[int, Tensor, float, int | None, float | None], Tensor],
        tables: StepTables | None,
        active: ActiveFamilies,
    ) -> StepInputs:
        device = tensors.device
        ids = device["ids"][:tokens]
        sampled = self._last.index_select(0, device["token_lanes"][:tokens])
        return StepInputs(
            input_ids=torch.where(ids < 0, sampled, ids),
            positions=device["positions"][:tokens],
            slot_mapping=device["slots"][:tokens],
            attend=attend,
            parts=tables.parts(active, tokens) if tables is not None and active else None,
        )

    def _sample(
        self, tensors: StepTensors, logits: Tensor, scale: RowScale | None, greedy: bool
    ) -> Tensor:
        device, rows = tensors.device, len(logits)
        # A positive factor moves no maximum.
        factors = None if scale is None or greedy else row_factors(scale)
        tokens = sample_tokens(
            logits,
            temperature=device["temperature"][:rows],
            top_k=device["top_k"][:rows],
            top_p=device["top_p"][:rows],
            min_p=device["min_p"][:rows],
            uniform=device["uniform"][:rows],
            scale=factors,
            softcap=self._decoder.config.logits_softcap,
            greedy_only=greedy,
        )
        # A row without a token (-1) has failed; its lane must still hold something to look up.
        self._last.index_copy_(0, device["lanes"][:rows], tokens.clamp_min(0))
        return tokens

    def _attend_decode(
        self, tensors: StepTensors, rows: int, table_blocks: int
    ) -> Callable[[int, Tensor, float, int | None, float | None], Tensor]:
        kv = self._kv
        tables, contexts = tensors.tables(rows, table_blocks), tensors.device["contexts"][:rows]

        def attend(
            layer: int, q: Tensor, scale: float, window: int | None, softcap: float | None
        ) -> Tensor:
            return paged_decode(
                q,
                kv.keys[layer],
                kv.values[layer],
                tables,
                contexts,
                scale=scale,
                window=window,
                softcap=softcap,
            ).flatten(1)

        return attend

    def _attend_rows(
        self, loaded: Loaded, rows: Sequence[Row]
    ) -> Callable[[int, Tensor, float, int | None, float | None], Tensor]:
        widest = self._widest(rows)
        if self._attention is None:
            return self._attend_mixed(loaded, len(rows), widest)
        return self._attention(
            self._kv,
            block_tables=self._prompt.tables(len(rows), widest),
            query_lens=[len(row.token_ids) for row in rows],
            context_lens=[row.start + len(row.token_ids) for row in rows],
            num_decode_rows=loaded.decode_rows,
        )

    def _attend_mixed(
        self, loaded: Loaded, rows: int, table_blocks: int
    ) -> Callable[[int, Tensor, float, int | None, float | None], Tensor]:
        kv, device, n = self._kv, self._prompt.device, loaded.decode_rows
        tables, contexts = self._prompt.tables(rows, table_blocks), device["contexts"][:rows]
        starts = device["starts"][: rows - n + 1]

        def attend(
            layer: int, q: Tensor, scale: float, window: int | None, softcap: float | None
        ) -> Tensor:
            keys, values = kv.keys[layer], kv.values[layer]
            out = torch.empty_like(q)
            if n:
                paged_decode(
                    q[:n],
                    keys,
                    values,
                    tables[:n],
                    contexts[:n],
                    scale=scale,
                    window=window,
                    softcap=softcap,
                    max_context=loaded.longest,
                    out=out[:n],
                )
            if n < rows:
                paged_prefill(
                    q[n:],
                    keys,
                    values,
                    tables[n:],
                    contexts[n:],
                    starts,
                    scale=scale,
                    window=window,
                    softcap=softcap,
                    out=out[n:],
                )
            return out.flatten(1)

        return attend

    # -- graphs -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(
        self,
        families: Sequence[ActiveFamilies] = (NO_FAMILIES,),
        progress: Callable[[int, int], None] | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        """Capture the graphs of these buckets (by default all) for these sets of families.

        Others are captured when a step first needs them, which delays that step.
        """
        shorts = (True,) if self._blocks_short == self._blocks_max else (True, False)
        keys = [
            GraphKey(rows, short, greedy, active)
            for active in families
            for greedy in (True, False)
            for short in shorts
            for rows in reversed(
                buckets or self.buckets
            )  # the largest first: the others fit in its memory
        ]
        with self._on_stream():
            self._load_padding()
            for done, key in enumerate(keys):
                if progress:
                    progress(done, len(keys))
                if key not in self._graphs:
                    self._capture(key)
            if progress:
                progress(len(keys), len(keys))

    @torch.inference_mode()
    def warm_prompts(
        self, families: Sequence[ActiveFamilies] = (NO_FAMILIES,), *, tokens: Sequence[int]
    ) -> None:
        """Run steps with prompts of these many tokens that read and write nothing.

        The first launch of each variant of a kernel compiles it, which takes seconds.
        """
        with self._on_stream():
            for count in tokens:
                self._prompt.load_padding(count, 1, self._blocks_short)
                loaded = Loaded(count, 0, 1, 0, greedy=False)
                for active in families:
                    attend = self._attend_mixed(loaded, 1, self._blocks_short)
                    inputs = self._inputs(self._prompt, count, attend, self._prompt_tables, active)
                    hidden, scale = self.forward(inputs)
                    at = self._prompt.device["sampled_at"][:1]
                    logits = F.linear(hidden.index_select(0, at), self._decoder.head)
                    if scale is not None:
                        scale = replace(scale, sums=scale.sums.index_select(1, at))
                    for greedy in (True, False):
                        self._sample(self._prompt, logits, scale, greedy)

    def _load_padding(self) -> None:
        """Rows that read and write nothing: what graphs are captured with."""
        most = self.buckets[-1]
        self._decode.load_padding(most, most, self._blocks_max)
        self._active(self._decode_tables, (), most)

    def _capture(self, key: GraphKey) -> _Captured:
        # Once as it is: the first launch of a kernel compiles it, which cannot be captured. The
        # step at hand is then run twice, so the second time must find the tokens of the first.
        last = self._last.clone()
        self._run_decode(key)
        self._last.copy_(last)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating pinned memory meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            captured = self._run_decode(key)
        captured = captured._replace(graph=graph)
        self._graphs[key] = captured
        return captured

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _table_blocks(self, short: bool) -> int:
        return self._blocks_short if short else self._blocks_max

    def _widest(self, rows: Sequence[Row]) -> int:
        return max(len(row.block_ids) for row in rows)


NOT_FINITE = "the model returned non-finite logits"


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way: where each request's token will lie, and when."""

    places: dict[str, int]
    tokens: Tensor
    done: "torch.cuda.Event | None"

    def wait(self) -> StepResult:
        """See ``Pending``."""
        if self.done is not None:
            self.done.synchronize()
        result = StepResult(token_ids={})
        for (request_id, _), token in zip(
            self.places.items(), self.tokens[: len(self.places)].tolist(), strict=True
        ):
            if token < 0:
                result.failed[request_id] = NOT_FINITE
            else:
                result.token_ids[request_id] = token
        return result
