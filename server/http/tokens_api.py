"""``POST /tokenize`` and ``/detokenize``, in vLLM's shapes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request

from shoal.server.http.answer import Json
from shoal.server.http.caller import caller_of
from shoal.server.http.jobs import check_token_ids, encode, encode_chat, resolve
from shoal.server.http.schemas import DetokenizeRequest, TokenizeRequest
from shoal.server.http.services import Services

T = TypeVar("T")

# More than these would hold up every other stream.
_INLINE_TOKENS = 2048


def tokens_router(services: Services) -> APIRouter:
    """The two routes."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Json:
        await _known(services, request, body.model)
        if body.messages is not None:
            messages = [message.as_template_input() for message in body.messages]
            ids = await encode_chat(
                services, messages, add_generation_prompt=body.add_generation_prompt
            )
        else:
            ids = await encode(
                services, body.prompt or "", add_special_tokens=body.add_special_tokens
            )
        strings = None
        if body.return_token_strs:
            strings = await _off_loop_if_long(services, ids, lambda: _strings(services, ids))
        return {
            "count": len(ids),
            "max_model_len": services.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Json:
        await _known(services, request, body.model)
        check_token_ids(services, body.tokens, "tokens")
        text = await _off_loop_if_long(
            services,
            body.tokens,
            lambda: services.tokenizer.decode(body.tokens, skip_special_tokens=False),
        )
        return {"prompt": text}

    return router


async def _off_loop_if_long(services: Services, ids: Sequence[int], call: Callable[[], T]) -> T:
    return call() if len(ids) <= _INLINE_TOKENS else await services.tokenize(call)


def _strings(services: Services, ids: Sequence[int]) -> list[str]:
    return [services.tokenizer.decode([i], skip_special_tokens=False) for i in ids]


async def _known(services: Services, request: Request, model: str | None) -> None:
    if model is not None:
        await resolve(services, caller_of(request), model)  # adapters share the base's tokenizer
