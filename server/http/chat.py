"""``POST /v1/chat/completions``."""

import time

from fastapi import APIRouter, Request, Response

from shoal.server.engine.request import TokenLogprobs
from shoal.server.http.answer import Choice, Json, NamedLogprob, answer, name_logprobs
from shoal.server.http.blends import resolve_asked
from shoal.server.http.caller import caller_of
from shoal.server.http.generation import Delta
from shoal.server.http.jobs import Job, encode_chat, make_job
from shoal.server.http.schemas import ChatRequest
from shoal.server.http.services import Services, TextCodec


def chat_router(services: Services) -> APIRouter:
    """The chat route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        arrival_s = time.monotonic()
        caller = caller_of(request)
        adapter = await resolve_asked(services, caller, body)
        messages = [message.as_template_input() for message in body.messages]
        prompt = await encode_chat(services, caller, messages)
        job = await make_job(
            services,
            body,
            [prompt],
            caller=caller,
            adapter=adapter,
            default_max_tokens=None,
            prompt_field="messages",
            id_prefix="chatcmpl",
            arrival_s=arrival_s,
        )
        return answer(services, body, job, ChatShape(services.tokenizer, body, job))

    return router


class ChatShape:
    """OpenAI's chat JSON."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, codec: TextCodec, body: ChatRequest, job: Job) -> None:
        self._codec = codec
        self._token_ids = bool(body.return_token_ids)
        self._logprobs = bool(body.logprobs)
        self._job = job

    def extra(self) -> Json:
        return {"prompt_token_ids": list(self._job.prompts[0])} if self._token_ids else {}

    def opening(self, index: int) -> Json | None:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunk(self, delta: Delta) -> Json:
        entry: Json = {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._named(delta.token_ids, delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            entry["stop_reason"] = delta.stop_reason
        if self._token_ids:
            entry["token_ids"] = list(delta.token_ids)
        return entry

    def whole(self, index: int, choice: Choice) -> Json:
        entry: Json = {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._named(tuple(choice.token_ids), tuple(choice.logprobs)),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._token_ids:
            entry["token_ids"] = choice.token_ids
        return entry

    def _named(
        self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]
    ) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {
                **_token(named),
                "top_logprobs": [_token(other) for other in named.top],
            }
            for named in name_logprobs(self._codec, token_ids, logprobs)
        ]
        return {"content": content, "refusal": None}


def _token(named: NamedLogprob) -> Json:
    return {"token": named.token, "logprob": named.logprob, "bytes": list(named.bytes)}
