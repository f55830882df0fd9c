"""What the engine counts, as one frozen snapshot that any thread may read. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges describe the moment after the last step; totals only grow.

    Attributes:
        running, waiting: requests in the batch, and accepted requests that are not.
        kv_blocks_used, kv_blocks_total: blocks held by running requests (blocks kept only for
            reuse count as unused), and all blocks.
        adapters_resident: adapters in the device bank.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up, and found.
        preemptions_total: times a running request had to give its blocks back.
        prompt_tokens_total: prompt tokens of the requests that got their first token.
        generation_tokens_total: tokens sampled and delivered.
        steps_total: steps that ran, failed ones included.
        last_step_s: how long the last step took: from the beginning of its planning, or from the
            landing of the step before it when that was later.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    adapters_resident: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    steps_total: int = 0
    last_step_s: float = 0.0
