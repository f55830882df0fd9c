"""Executes step plans: integers in, token ids out.

The only module that turns a ``StepPlan`` into tensors. It owns no policy: which rows run, which
blocks they write and where each adapter sits is in the plan.
"""

import torch
from torch import Tensor

from shoal.adapters.bank import AdapterBank
from shoal.adapters.host_tier import HostTier
from shoal.server.engine.plan import Done, Row, StepPlan, StepResult
from shoal.server.model.batch import Batch
from shoal.server.model.decoder import Decoder
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.sampler import Sampler


class ModelRunner:
    """A ``Runner`` over a real decoder.

    Args:
        decoder: the base model, on the device.
        kv: its paged KV cache.
        bank: the device bank of adapters.
        host: where adapters are staged before the plan asks for them.
        sampler: chooses the tokens.
    """

    lookahead = False
    recorded_prompts = None

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        bank: AdapterBank,
        host: HostTier,
        sampler: Sampler,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._bank = bank
        self._host = host
        self._sampler = sampler

    def submit(self, plan: StepPlan) -> Done:
        """Run one step. See ``Runner``."""
        return Done(self._run(plan))

    @torch.inference_mode()
    def hidden(self, plan: StepPlan) -> Tensor:
        """Run a step without sampling.

        Returns:
            Hidden states of all its tokens behind the final norm, ``(tokens, hidden)``, in the
            order of the rows.
        """
        for load in (*plan.adapter_loads, *plan.prefetches):
            self._bank.load(load.adapter, self._host.get(load.adapter.spec.digest))
        batch = Batch.from_rows(
            plan.rows,
            block_tokens=self._kv.block_tokens,
            device=self._decoder.device,
            adapters=self._bank.step([(row.adapter, len(row.token_ids)) for row in plan.rows]),
        )
        return self._decoder(batch, self._kv)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        hidden = self.hidden(plan)
        rows = [row for row in plan.rows if row.sample]
        if not rows:
            return StepResult(token_ids={})
        last = torch.tensor(sampled_positions(plan.rows), device=hidden.device)
        logits = self._decoder.logits(hidden.index_select(0, last))
        samples = self._sampler.sample(logits, rows)
        result = StepResult(token_ids={})
        for i, row in enumerate(rows):
            if not samples.finite[i]:
                result.failed[row.request_id] = "the model returned non-finite logits"
                continue
            result.token_ids[row.request_id] = samples.token_ids[i]
            logprobs = samples.logprobs[i]
            if logprobs is not None:
                result.logprobs[row.request_id] = logprobs
        return result


def sampled_positions(rows: tuple[Row, ...]) -> list[int]:
    """Index, among the step's concatenated tokens, of the last token of each sampling row."""
    positions, end = [], 0
    for row in rows:
        end += len(row.token_ids)
        if row.sample:
            positions.append(end - 1)
    return positions
