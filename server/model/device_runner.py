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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.bank import AdapterBank
from shoal.adapters.host_tier import HostTier
from shoal.adapters.spec import RowAdapter
from shoal.adapters.tables import ActiveFamilies, StepTables
from shoal.kernels.core_apply.epilogue import RowScale
from shoal.kernels.paged_attention.kernel import paged_decode, paged_prefill
from shoal.kernels.sample_tokens.kernel import sample_tokens
from shoal.server.engine.plan import DeviceLost, Done, Pending, Row, StepPlan, StepResult
from shoal.server.model.decoder import Decoder
from shoal.server.model.fused import Attend, FusedForward, StepInputs, row_factors
from shoal.server.model.graphs import (
    CHUNK_TOKENS,
    CHUNKS,
    NO_FAMILIES,
    GraphKey,
    Graphs,
    GraphSizes,
    ends,
)
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.sampler import Sampler, needs_host
from shoal.server.model.step_tensors import Layout, Loaded, StepTensors, layout_of

log = logging.getLogger(__name__)

# Contexts up to this many positions have graphs of their own: their block tables are narrow, and
# a row's keys need not be shared by several programs.
SHORT_CONTEXT = 1024
# Steps under way at once, and one whose result is being read.
OUTPUT_RING = 4
# So much of the device's memory must be free for another graph to be captured in an idle moment
# (some 5 MB each for 32 layers): what steps allocate comes out of the same.
FREE_SHARE = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """As of the scheduler: rows and tokens of a step, tokens of a request."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


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
    ) -> Attend:
        """Rows in order, decode rows first; tables are ``(rows, widest)`` on the device."""
        ...


class _Arrays(NamedTuple):
    """Static tensors of steps: their rows, and which token has which adapter."""

    tensors: StepTensors
    tables: StepTables | None


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
        self.limits = limits
        self._decoder: Decoder = forward.decoder
        self._kv = kv
        self._bank = bank
        self._host = host
        self._entropy = entropy or random.SystemRandom()
        self._sampler = Sampler(self._entropy)
        device = self._decoder.device
        self._cuda = device.type == "cuda"
        self._attention = attention
        self._stream = (
            torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        )
        block_tokens = kv.block_tokens
        self._blocks_max = -(-limits.max_model_len // block_tokens)
        self._blocks_short = min(self._blocks_max, -(-SHORT_CONTEXT // block_tokens))

        def arrays(rows: int, tokens: int) -> _Arrays:
            tensors = StepTensors(
                max_tokens=tokens,
                max_rows=rows,
                num_lanes=limits.max_num_seqs,
                max_blocks=self._blocks_max,
                block_tokens=block_tokens,
                device=device,
            )
            return _Arrays(tensors, None if bank is None else StepTables(bank, tokens))

        # What graphs read, and what steps read that have none.
        most = limits.max_num_seqs
        shorts = (True,) if self._blocks_short == self._blocks_max else (True, False)
        self.sizes = GraphSizes(most, shorts)
        self._largest = self.sizes.largest
        self._static = arrays(self._largest.rows, self._largest.tokens)
        self._exact = arrays(most, limits.max_num_batched_tokens)
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
        self._logits = head.new_empty(limits.max_num_seqs + CHUNKS, len(head))
        self.graphs = Graphs[_Captured](
            enabled=self._cuda if graphs is None else graphs,
            is_full=partial(_is_full, device),  # without the runner: memory must not wait for gc
        )
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None

    @property
    def recorded_prompts(self) -> tuple[int, int] | None:
        """As ``SchedulerLimits`` wants it: None where no step is captured."""
        return self.sizes.prompts if self.graphs.enabled and self._attention is None else None

    # -- running ------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Pending:
        """Begin a step. See ``Runner``."""
        with _noticing_loss(), self._on_stream():
            self._load(plan)
            layout = self._layout(plan.rows)
            if layout is None:
                return self._submit_exact(plan.rows)
            return self._submit_static(plan.rows, layout)

    def _layout(self, rows: Sequence[Row]) -> Layout | None:
        """The layout of the graph that takes these rows; None when there is none."""
        if self._attention is not None:
            return None
        return self.sizes.layout(layout_of(rows), all_sample=all(row.sample for row in rows))

    def _submit_static(self, rows: Sequence[Row], layout: Layout) -> Pending:
        longest = max(row.start + len(row.token_ids) for row in rows)
        short = longest <= self._blocks_short * self._kv.block_tokens
        loaded = self._static.tensors.load(
            rows, layout, entropy=self._entropy, table_blocks=self._table_blocks(short)
        )
        active = self._active(self._static, rows, layout)
        greedy = loaded.greedy and not layout.chunks  # rare enough not to have graphs of its own
        captured = self._replay(GraphKey(layout, short, greedy, active))
        sampling = [row for row in rows if row.sample]
        return self._finish(
            sampling, captured.logits, captured.scale, captured.tokens, self._static.tensors
        )

    def _replay(self, key: GraphKey) -> _Captured:
        captured = self.graphs.get(key)
        if captured is None and self.graphs.wants(key):
            self._rehearse(key)
            captured = self._try_capture(key)
        if captured is None:
            return self._run(key)
        captured.graph.replay()
        return captured

    @torch.inference_mode()
    def hidden(self, plan: StepPlan) -> Tensor:
        """Run a step without sampling, while no other is under way.

        Returns:
            Hidden states of all its tokens behind the final norm, ``(tokens, hidden)``, in the
            order of the rows.
        """
        with _noticing_loss():
            with self._on_stream():
                self._load(plan)
                hidden, scale, _ = self._forward_exact(plan.rows)
                hidden = self.forward.normalised(hidden, scale)
            if self._stream is not None:
                current = torch.cuda.current_stream(hidden.device)
                current.wait_stream(self._stream)
                hidden.record_stream(current)
        return hidden

    def _load(self, plan: StepPlan) -> None:
        for load in (*plan.adapter_loads, *plan.prefetches):
            assert self._bank is not None
            assert self._host is not None
            self._bank.load(load.adapter, self._host.get(load.adapter.spec.digest))

    def _submit_exact(self, rows: Sequence[Row]) -> Pending:
        tensors = self._exact.tensors
        hidden, scale, loaded = self._forward_exact(rows)
        sampling = [row for row in rows if row.sample]
        if not sampling:
            return self._pending({}, None)
        hidden, scale = self._sampled(tensors, hidden, scale, loaded.sampled)
        logits = F.linear(hidden, self._decoder.head)
        tokens = self._sample(tensors, logits, scale, loaded.greedy)
        return self._finish(sampling, logits, scale, tokens, tensors)

    def _forward_exact(self, rows: Sequence[Row]) -> tuple[Tensor, RowScale | None, Loaded]:
        """The forward pass of rows of any layout, without a graph."""
        layout, widest = layout_of(rows), max(len(row.block_ids) for row in rows)
        tensors = self._exact.tensors
        loaded = tensors.load(rows, layout, entropy=self._entropy, table_blocks=widest)
        active = self._active(self._exact, rows, layout)
        if self._attention is None:
            attend = self._attend(tensors, layout, widest, loaded.longest)
        else:
            attend = self._attention(
                self._kv,
                block_tables=tensors.tables(layout.rows, widest),
                query_lens=[len(row.token_ids) for row in rows],
                context_lens=[row.start + len(row.token_ids) for row in rows],
                num_decode_rows=layout.decode_rows,
            )
        hidden, scale = self.forward(self._inputs(self._exact, layout, attend, active))
        return hidden, scale, loaded

    def _active(self, arrays: _Arrays, rows: Sequence[Row], layout: Layout) -> ActiveFamilies:
        """Say on the device which token has which adapter."""
        if arrays.tables is None:
            return NO_FAMILIES
        decode = layout_of(rows).decode_rows
        owners: list[tuple[RowAdapter | None, int]] = [
            (row.adapter, len(row.token_ids)) for row in rows
        ]
        if layout.chunks and layout.decode_rows > decode:
            owners.insert(decode, (None, layout.decode_rows - decode))
        return arrays.tables.fill(owners, layout.tokens)

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
        # As in `_sample`: where a row has failed, -1 is no token to look up.
        chosen = torch.tensor(samples.token_ids, device=logits.device).clamp_min(0)
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

    def _run(self, key: GraphKey, layers: Sequence[int] | None = None) -> _Captured:
        """The step of ``key`` over the static tensors; captured, or run as it is."""
        tensors, layout = self._static.tensors, key.layout
        attend = self._attend(tensors, layout, self._table_blocks(key.short))
        inputs = self._inputs(self._static, layout, attend, key.active)
        hidden, scale = self.forward(inputs, layers)
        if layout.chunks:
            hidden, scale = self._sampled(tensors, hidden, scale, layout.rows)
        logits = self._logits[: layout.rows]
        torch.mm(hidden, self._decoder.head.t(), out=logits)
        tokens = self._sample(tensors, logits, scale, key.greedy)
        return _Captured(None, logits, scale, tokens)  # type: ignore[arg-type]

    def _inputs(
        self, arrays: _Arrays, layout: Layout, attend: Attend, active: ActiveFamilies
    ) -> StepInputs:
        device, tokens = arrays.tensors.device, layout.tokens
        ids = device["ids"][:tokens]
        sampled = self._last.index_select(0, device["token_lanes"][:tokens])
        parts = None
        if arrays.tables is not None and active:
            parts = arrays.tables.parts(active, tokens, max_rows=layout.rows + 1)
        return StepInputs(
            input_ids=torch.where(ids < 0, sampled, ids),
            positions=device["positions"][:tokens],
            slot_mapping=device["slots"][:tokens],
            attend=attend,
            parts=parts,
        )

    def _sampled(
        self, tensors: StepTensors, hidden: Tensor, scale: RowScale | None, count: int
    ) -> tuple[Tensor, RowScale | None]:
        """The tokens whose logits are wanted."""
        at = tensors.device["sampled_at"][:count]
        if scale is not None:
            scale = replace(scale, sums=scale.sums.index_select(1, at))
        return hidden.index_select(0, at), scale

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

    def _attend(
        self,
        tensors: StepTensors,
        layout: Layout,
        table_blocks: int,
        max_context: int | None = None,
    ) -> Attend:
        """Attention of a step in this layout; no row is longer than ``max_context``."""
        kv, n = self._kv, layout.decode_rows
        tables = tensors.tables(layout.rows, table_blocks)
        contexts = tensors.device["contexts"][: layout.rows]
        starts = tensors.device["starts"][: layout.chunks + 1]

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
                    max_context=max_context,
                    out=out[:n],
                )
            if layout.chunks:
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
        """Capture the decode steps of these buckets (by default all) for these sets of families.

        Others are captured when a step first needs them, which delays that step.
        """
        keys = self.sizes.decode_keys(families, buckets)
        with self._on_stream():
            self._load_nothing(self._static, self._largest)
            for done, key in enumerate(keys):
                if progress:
                    progress(done, len(keys))
                if key not in self.graphs:
                    self._rehearse(key)
                    self._capture(key)
            if progress:
                progress(len(keys), len(keys))

    @torch.inference_mode()
    def rehearse(self, families: Sequence[ActiveFamilies]) -> None:
        """Run what ``capture`` would capture, and what ``prepare`` will, and capture nothing."""
        self._rehearse_all((*self.sizes.decode_keys(families), *self.graphs.planned))

    @torch.inference_mode()
    def rehearse_ends(self, families: Sequence[ActiveFamilies]) -> None:
        """Run the smallest and largest steps over the static tensors, and capture nothing."""
        sizes = self.sizes
        keys = sizes.decode_keys(families, ends(sizes.buckets))
        if self._attention is None:
            keys += sizes.prompt_keys(families, ends(CHUNK_TOKENS), ends(sizes.chunk_buckets))
        self._rehearse_all(keys)

    def _rehearse_all(self, keys: Sequence[GraphKey]) -> None:
        with self._on_stream():
            self._load_nothing(self._static, self._largest)
            for key in keys:
                self._rehearse(key)

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture one more graph that a step may want, which takes some 0.2 s.

        For moments in which no step is under way and none waits.

        Returns:
            False when there is none left.
        """
        key = self.graphs.next()
        if key is None:
            return False
        with _noticing_loss(), self._on_stream():
            arrays = self._static
            arrays.tensors.load(
                (), key.layout, entropy=self._entropy, table_blocks=self._table_blocks(key.short)
            )
            if arrays.tables is not None:
                arrays.tables.nobody(key.active, key.layout.tokens)
            if self._try_capture(key, rehearsed=False) is None and self._cuda:
                torch.cuda.synchronize()  # raises now, not in the next step, what is beyond help
        if not self.graphs.planned:
            log.info("all planned graphs are captured graphs=%d", len(self.graphs))
        return True

    @torch.inference_mode()
    def warm_prompts(
        self,
        families: Sequence[ActiveFamilies] = (NO_FAMILIES,),
        *,
        tokens: Sequence[int],
        chunks: int = 1,
    ) -> None:
        """Run steps with ``chunks`` prompts of these many tokens that read and write nothing.

        The first launch of each variant of a kernel compiles it, which takes seconds.
        """
        tensors, last = self._exact.tensors, self._last.clone()
        with self._on_stream():
            for count in tokens:
                layout = Layout(0, chunks, count)
                self._load_nothing(self._exact, layout)
                for active in families:
                    attend = self._attend(tensors, layout, self._blocks_short)
                    inputs = self._inputs(self._exact, layout, attend, active)
                    hidden, scale = self.forward(inputs, self.forward.kinds_of_layers)
                    hidden, scale = self._sampled(tensors, hidden, scale, 1)
                    logits = F.linear(hidden, self._decoder.head)
                    for greedy in (True, False):
                        self._sample(tensors, logits, scale, greedy)
            self._last.copy_(last)

    @torch.inference_mode()
    def warm_decodes(self, contexts: Sequence[int]) -> None:
        """Run a row as it runs beside prompts without a graph, of at most these many positions.

        Also the sampler of rows that need the host's.
        """
        arrays, layout = self._exact, Layout(1)
        with self._on_stream():
            self._load_nothing(arrays, layout)
            for context in contexts:
                attend = self._attend(arrays.tensors, layout, self._blocks_max, context)
                inputs = self._inputs(arrays, layout, attend, NO_FAMILIES)
                self.forward(inputs, self.forward.kinds_of_layers)
            self._sampler.rehearse(self._logits[:1].float())

    def _load_nothing(self, arrays: _Arrays, layout: Layout) -> None:
        """Places that read and write nothing: what graphs are captured with."""
        arrays.tensors.load((), layout, entropy=self._entropy, table_blocks=self._blocks_max)
        self._active(arrays, (), layout)

    def _rehearse(self, key: GraphKey) -> None:
        """Run a step as it is: the first launch of a kernel compiles it, which cannot be captured.

        A few layers of it: what they write to the cache the step at hand writes again. It must
        find the tokens that it would have found.
        """
        last = self._last.clone()
        self._run(key, self.forward.kinds_of_layers)
        self._last.copy_(last)

    def _try_capture(self, key: GraphKey, *, rehearsed: bool = True) -> _Captured | None:
        try:
            if not rehearsed:
                self._rehearse(key)
            return self._capture(key)
        except RuntimeError:  # such as no memory
            self.graphs.stop()
            log.exception("graph_not_captured key=%s graphs=%d", key, len(self.graphs))
            return None

    def _capture(self, key: GraphKey) -> _Captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating pinned memory meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            captured = self._run(key)
        captured = captured._replace(graph=graph)
        self.graphs.add(key, captured)
        return captured

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _table_blocks(self, short: bool) -> int:
        return self._blocks_short if short else self._blocks_max


NOT_FINITE = "the model returned non-finite logits"


def _is_full(device: torch.device) -> bool:
    """Whether less of the device's memory is free than graphs leave to steps."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < FREE_SHARE * total


@contextmanager
def _noticing_loss() -> Iterator[None]:
    """Raise ``DeviceLost`` for an error that has left the CUDA context unusable."""
    try:
        yield
    except RuntimeError as error:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # after such an error every call fails, also this one
                raise DeviceLost("the CUDA context is lost") from error
        raise


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way: where each request's token will lie, and when."""

    places: dict[str, int]
    tokens: Tensor
    done: "torch.cuda.Event | None"

    def wait(self) -> StepResult:
        """See ``Pending``."""
        if self.done is not None:
            with _noticing_loss():
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
