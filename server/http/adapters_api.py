"""``/v1/adapters``: upload, list, show, history, activate, delete.

The rules (names, versions, what can be served) are the library's; here they become HTTP.
"""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from shoal.adapters.errors import AdapterError
from shoal.server.errors import ShoalError
from shoal.server.http.answer import Json
from shoal.server.http.models_api import PAGE_MAX, Limit
from shoal.server.http.schemas import ActivateRequest
from shoal.server.http.services import Services, names_from
from shoal.server.http.uploads import received

if TYPE_CHECKING:
    from shoal.adapters.library import AdapterInfo

Prefix = Annotated[str, Query(max_length=128)]


def adapters_router(services: Services) -> APIRouter:
    """The adapter routes."""
    router = APIRouter(prefix="/v1/adapters")
    library = services.library

    @router.post("", status_code=201)
    async def upload_adapter(request: Request) -> JSONResponse:
        async with received(request, max_bytes=services.config.max_upload_bytes) as upload:
            try:
                with names_from("name"):
                    info = await services.work(lambda: library.upload(upload.name, upload.files))
            except (AdapterError, ShoalError):
                services.metrics.upload("refused")
                raise
        services.metrics.upload("accepted")
        location = {"Location": f"/v1/adapters/{info.name}"}
        return JSONResponse(adapter_json(info), status_code=201, headers=location)

    @router.get("")
    async def list_adapters(
        limit: Limit = PAGE_MAX, after: str | None = None, prefix: Prefix = ""
    ) -> Json:
        with names_from("after"):
            infos, following = await services.lookup(
                lambda: library.list(limit=limit, after=after, prefix=prefix)
            )
        return {
            "object": "list",
            "data": [adapter_json(info) for info in infos],
            "has_more": following is not None,
        }

    @router.get("/{name}")
    async def show_adapter(name: str) -> Json:
        return adapter_json(await services.lookup(lambda: library.resolve(name)))

    @router.get("/{name}/versions")
    async def list_versions(name: str) -> Json:
        infos = await services.lookup(lambda: library.versions(name))
        return {"object": "list", "data": [adapter_json(info) for info in infos]}

    @router.post("/{name}/activate")
    async def activate_version(name: str, body: ActivateRequest) -> Json:
        return adapter_json(await services.lookup(lambda: library.activate(name, body.version)))

    @router.delete("/{name}", status_code=204)
    async def delete_adapter(name: str) -> Response:
        await services.lookup(lambda: library.delete(name))
        return Response(status_code=204)

    return router


def adapter_json(info: "AdapterInfo") -> Json:
    """One version as JSON."""
    return {
        "object": "adapter",
        "name": info.name,
        "version": info.version,
        "digest": info.digest,
        "family": info.family,
        "format": info.format,
        "rank": info.rank,
        "bytes": info.bytes,
        "basis_id": info.basis_id,
        "created": int(info.created),
        "active": info.active,
    }
