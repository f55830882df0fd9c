"""``GET /v1/models`` and ``/v1/models/{id}``: the base, then the adapters one can use."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request

from shoal.server.http.adapter_errors import names_from
from shoal.server.http.answer import Json
from shoal.server.http.caller import Caller, caller_of
from shoal.server.http.jobs import resolve
from shoal.server.http.services import Services

if TYPE_CHECKING:
    from shoal.adapters.library import AdapterInfo

PAGE_MAX = 1000

Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]


def models_router(services: Services) -> APIRouter:
    """The model routes."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models(
        request: Request, limit: Limit = PAGE_MAX, after: str | None = None
    ) -> Json:
        caller = caller_of(request)
        data: list[Json] = []
        if after is None:
            data.append(_base(services))
        elif after == services.model_name:
            after = None
        infos, more = await _page(services, caller.owner, limit - len(data), after)
        data += [_adapter(services, caller, info) for info in infos]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": more,
        }

    @router.get("/v1/models/{model:path}")
    async def show_model(model: str, request: Request) -> Json:
        caller = caller_of(request)
        info = await resolve(services, caller, model)
        if info is None:
            return _base(services)
        return _adapter(services, caller, info) | {"id": model}

    return router


async def _page(
    services: Services, owner: str, limit: int, after: str | None
) -> "tuple[Sequence[AdapterInfo], bool]":
    """Up to ``limit`` adapters that ``owner`` can use, and whether there are more: first its own
    by name, then those shared with it by ``owner/name``."""
    library = services.library
    infos: Sequence[AdapterInfo] = ()
    with names_from("after"):
        if after is None or "/" not in after:
            infos, following = await services.lookup(
                lambda: library.list(limit=max(limit, 1), after=after, owner=owner),
                owner=owner,
            )
            if len(infos) > limit or following is not None:
                return infos[:limit], True
            after = None
        if not owner:
            return infos, False  # who has no name was given nothing
        room, cursor = limit - len(infos), after
        shared, following = await services.lookup(
            lambda: library.list_shared(limit=max(room, 1), after=cursor, owner=owner),
            owner=owner,
        )
    return [*infos, *shared[:room]], len(shared) > room or following is not None


def _base(services: Services) -> Json:
    return {
        "id": services.model_name,
        "object": "model",
        "created": services.started,
        "owned_by": "shoal",
        "root": services.model_root or services.model_name,
        "parent": None,
        "max_model_len": services.max_model_len,
    }


def _adapter(services: Services, caller: Caller, info: "AdapterInfo") -> Json:
    name = caller.name_of(info)
    return {
        "id": name,
        "object": "model",
        "created": int(info.created),
        "owned_by": info.owner or "shoal",
        "root": f"{name}@{info.version}",
        "parent": services.model_name,
        "max_model_len": services.max_model_len,
    }
