"""One HTTP request's generation: token events in, text out.

Asks for its run (``runs.py``), which takes and gives back, and turns what that yields into text,
stop strings included. Knows nothing of JSON or OpenAI's shapes.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from shoal.server.engine.request import FinishReason, TokenEvent, TokenLogprobs
from shoal.server.http.jobs import Job
from shoal.server.http.services import Services, TextStream
from shoal.server.http.stop_strings import StopMatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What became known of one choice.

    Attributes:
        text: final text; may be empty while something is held back.
        finish_reason: set on a choice's last delta only.
        stop_reason: the stop string, or stop token id, that ended it; ``"deadline"`` (with
            ``length``, which clients know) when its deadline did; None for end of sequence.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Usage:
    """Token counts; prompts count once, however many choices they have."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Generation:
    """Runs a job. ``usage`` grows while ``deltas`` is read, and is final after its last delta."""

    services: Services
    job: Job
    usage: Usage = field(init=False)

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(ids) for ids in self.job.prompts))

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """All choices' deltas, each choice in order. Close it to abort what still runs.

        Raises:
            ShoalError: nothing more will come; its message is for the client.
        """
        job = self.job
        run = self.services.run(job)
        tokenizer = self.services.tokenizer
        texts = {
            index: _ChoiceText(index, job, tokenizer.stream(job.skip_special))
            for index in range(job.num_choices)
        }
        async with aclosing(run.events()) as events:
            async for index, event in events:
                text = texts.get(index)
                if text is None:
                    continue  # made before the engine heard that the choice is complete
                self.usage.completion_tokens += len(event.token_ids)
                if index % job.n == 0:
                    self.usage.cached_tokens += event.cached_tokens
                delta = text.take(event)
                if delta.finish_reason is not None:
                    del texts[index]
                    if event.finish_reason is None:
                        run.stop(index)
                    yield delta
                    if not texts:
                        return
                elif delta.text or delta.token_ids:
                    yield delta


class _ChoiceText:
    """Token events of one choice in, deltas out."""

    def __init__(self, index: int, job: Job, stream: TextStream) -> None:
        self._index = index
        self._stop_ids = job.sampling.stop_token_ids
        self._include_stop = job.include_stop
        self._min_tokens = job.sampling.min_tokens
        self._stream = stream
        self._stops = StopMatcher(job.stops, include=job.include_stop)
        self._tokens = 0

    def take(self, event: TokenEvent) -> Delta:
        shown = event.token_ids
        ended_by_id = event.finish_reason is FinishReason.STOP and bool(shown)
        last_is_stop_id = ended_by_id and shown[-1] in self._stop_ids
        if ended_by_id and not (last_is_stop_id and self._include_stop):
            shown = shown[:-1]
        text = self._push(shown)
        reason = event.finish_reason
        stop_reason: str | int | None = None
        if last_is_stop_id:
            stop_reason = event.token_ids[-1]
        if reason is not None and self._stops.matched is None:
            text += self._stops.push(self._stream.flush())
            if self._stops.matched is None:
                text += self._stops.flush()
        if self._stops.matched is not None:
            reason = FinishReason.STOP
        elif reason is FinishReason.DEADLINE:
            reason, stop_reason = FinishReason.LENGTH, "deadline"
        return Delta(
            index=self._index,
            text=text,
            token_ids=event.token_ids,
            logprobs=event.logprobs,
            finish_reason=reason,
            stop_reason=self._stops.matched or stop_reason,
        )

    def _push(self, ids: Sequence[int]) -> str:
        self._tokens += len(ids)
        text = self._stream.push(ids)
        if self._tokens < self._min_tokens:
            return text  # stop strings count from min_tokens on, as ends of sequence do
        return self._stops.push(text)
