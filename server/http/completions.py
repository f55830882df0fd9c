"""``POST /v1/completions``."""

import time
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from shoal.server.engine.request import TokenLogprobs
from shoal.server.errors import PromptTooLong
from shoal.server.http.answer import Choice, Json, answer, name_logprobs
from shoal.server.http.blends import resolve_asked
from shoal.server.http.caller import Caller, caller_of
from shoal.server.http.generation import Delta
from shoal.server.http.jobs import Job, check_token_ids, encode, make_job
from shoal.server.http.schemas import CompletionRequest
from shoal.server.http.services import Services, TextCodec

# OpenAI's default for this endpoint.
_DEFAULT_MAX_TOKENS = 16


def completions_router(services: Services) -> APIRouter:
    """The plain completions route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        arrival_s = time.monotonic()
        caller = caller_of(request)
        adapter = await resolve_asked(services, caller, body)
        prompts = [await _ids(services, caller, prompt, body) for prompt in body.prompt]
        job = await make_job(
            services,
            body,
            prompts,
            caller=caller,
            adapter=adapter,
            default_max_tokens=_DEFAULT_MAX_TOKENS,
            prompt_field="prompt",
            id_prefix="cmpl",
            arrival_s=arrival_s,
        )
        return answer(services, body, job, CompletionShape(services.tokenizer, body, job))

    return router


async def _ids(
    services: Services, caller: Caller, prompt: str | Sequence[int], body: CompletionRequest
) -> Sequence[int]:
    if isinstance(prompt, str):
        return await encode(services, caller, prompt, add_special_tokens=body.add_special_tokens)
    if len(prompt) >= services.max_model_len:
        raise PromptTooLong(
            f"`prompt` has {len(prompt)} tokens: must be at most {services.max_model_len - 1}",
            param="prompt",
        )
    check_token_ids(services, prompt, "prompt")
    return prompt


class CompletionShape:
    """OpenAI's text completion JSON."""

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, codec: TextCodec, body: CompletionRequest, job: Job) -> None:
        self._codec = codec
        self._body = body
        self._job = job
        self._offsets = [0] * job.num_choices
        self._begun: set[int] = set()

    def extra(self) -> Json:
        return {}

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: Delta) -> Json:
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        entry: Json = {
            "index": delta.index,
            "text": (self._echoed(delta.index) if first else "") + delta.text,
            "logprobs": self._named(delta.index, delta.token_ids, delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            entry["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            if first:
                entry["prompt_token_ids"] = list(self._job.prompt_of(delta.index))
            entry["token_ids"] = list(delta.token_ids)
        return entry

    def whole(self, index: int, choice: Choice) -> Json:
        entry: Json = {
            "index": index,
            "text": self._echoed(index) + choice.text,
            "logprobs": self._named(index, choice.token_ids, choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            entry["prompt_token_ids"] = list(self._job.prompt_of(index))
            entry["token_ids"] = choice.token_ids
        return entry

    def _echoed(self, index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompt[index // self._job.n]
        return prompt if isinstance(prompt, str) else self._codec.decode(prompt)

    def _named(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> Json | None:
        if self._body.logprobs is None:
            return None
        named = name_logprobs(self._codec, token_ids, logprobs)
        offsets = []
        for token in named:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.token)
        return {
            "tokens": [token.token for token in named],
            "token_logprobs": [token.logprob for token in named],
            "top_logprobs": [
                {one.token: one.logprob for one in (token, *token.top)} for token in named
            ],
            "text_offset": offsets,
        }
