"""``POST /tokenize`` and ``/detokenize``, in vLLM's shapes.

They count as requests: a long text keeps a core busy.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import APIRouter, Request

from shoal.server.http.answer import Json
from shoal.server.http.caller import Caller, caller_of
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
        caller = caller_of(request)
        async with services.begin(caller.owner, caller.limits):
            await _known(services, caller, body.model)
            if body.messages is not None:
                messages = [message.as_template_input() for message in body.messages]
                ids = await encode_chat(
                    services, caller, messages, add_generation_prompt=body.add_generation_prompt
                )
            else:
                ids = await encode(
                    services, caller, body.prompt or "", add_special_tokens=body.add_special_tokens
                )
            strings = None
            if body.return_token_strs:
                strings = await _off_loop_if_long(
                    services, caller, ids, lambda: _strings(services, ids)
                )
        return {
            "count": len(ids),
            "max_model_len": services.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Json:
        caller = caller_of(request)
        async with services.begin(caller.owner, caller.limits):
            await _known(services, caller, body.model)
            check_token_ids(services, body.tokens, "tokens")
            text = await _off_loop_if_long(
                services,
                caller,
                body.tokens,
                lambda: services.tokenizer.decode(body.tokens, skip_special_tokens=False),
            )
        return {"prompt": text}

    return router


async def _off_loop_if_long(
    services: Services, caller: Caller, ids: Sequence[int], call: Callable[[], T]
) -> T:
    if len(ids) <= _INLINE_TOKENS:
        return call()
    return await services.tokenize(call, owner=caller.owner)


def _strings(services: Services, ids: Sequence[int]) -> list[str]:
    return [services.tokenizer.decode([i], skip_special_tokens=False) for i in ids]


async def _known(services: Services, caller: Caller, model: str | None) -> None:
    if model is not None:
        await resolve(services, caller, model)  # adapters share the base's tokenizer
