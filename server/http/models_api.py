"""``GET /v1/models`` and ``/v1/models/{id}``: the base first, then the adapters by name."""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query

from shoal.server.http.answer import Json
from shoal.server.http.jobs import resolve
from shoal.server.http.services import Services, names_from

if TYPE_CHECKING:
    from shoal.adapters.library import AdapterInfo

PAGE_MAX = 1000

Limit = Annotated[int, Query(ge=1, le=PAGE_MAX)]


def models_router(services: Services) -> APIRouter:
    """The model routes."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models(limit: Limit = PAGE_MAX, after: str | None = None) -> Json:
        data: list[Json] = []
        if after is None:
            data.append(_base(services))
        elif after == services.model_name:
            after = None
        room, following = limit - len(data), None
        if room:
            with names_from("after"):
                infos, following = await services.lookup(
                    lambda: services.library.list(limit=room, after=after)
                )
            data += [_adapter(services, info) for info in infos]
        else:
            following = "" if await services.lookup(services.library.count) else None
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": following is not None,
        }

    @router.get("/v1/models/{model:path}")
    async def show_model(model: str) -> Json:
        info = await resolve(services, model)
        return _base(services) if info is None else _adapter(services, info) | {"id": model}

    return router


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


def _adapter(services: Services, info: "AdapterInfo") -> Json:
    return {
        "id": info.name,
        "object": "model",
        "created": int(info.created),
        "owned_by": "shoal",
        "root": f"{info.name}@{info.version}",
        "parent": services.model_name,
        "max_model_len": services.max_model_len,
    }
