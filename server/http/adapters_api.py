"""``/v1/adapters``: upload, list, show, history, activate, tags, shares, delete.

The rules (names, versions, what can be served) are the library's; here they become HTTP.
"""

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from shoal.adapters.errors import AdapterError
from shoal.adapters.registry.names import EVERYBODY
from shoal.server.errors import InvalidRequest, ShoalError
from shoal.server.http.adapter_errors import names_from
from shoal.server.http.answer import Json
from shoal.server.http.caller import Caller, caller_of
from shoal.server.http.models_api import PAGE_MAX, Limit
from shoal.server.http.schemas import ActivateRequest, TagsRequest
from shoal.server.http.services import Services
from shoal.server.http.uploads import received

if TYPE_CHECKING:
    from shoal.adapters.library import AdapterInfo

Prefix = Annotated[str, Query(max_length=128)]
_LIST_OWNER = "list another owner's adapters"


def adapters_router(services: Services) -> APIRouter:
    """The adapter routes.

    ``name`` is a bare name or ``owner/name``; what the caller may not see answers 404 like what
    does not exist, whatever is asked of it.
    """
    router = APIRouter(prefix="/v1/adapters")
    library = services.library

    async def receive(request: Request, caller: Caller) -> "AdapterInfo":
        async with received(request, max_bytes=services.config.max_upload_bytes) as upload:
            owner, name = caller.acts_on(upload.name)
            limits = caller.limits if owner == caller.owner else None

            def take() -> "AdapterInfo":
                try:
                    return library.upload(name, upload.files, owner=owner, limits=limits)
                finally:
                    upload.remove()

            try:
                with names_from("name"):
                    return await services.work(take, owner=caller.owner)
            except (AdapterError, ShoalError):
                services.counts.upload("refused")
                raise

    @router.post("", status_code=201)
    async def upload_adapter(request: Request) -> JSONResponse:
        caller = caller_of(request)
        caller.must_write()
        async with services.begin(caller.owner, caller.limits, upload=True):
            info = await receive(request, caller)
        services.counts.upload("accepted")
        location = {"Location": f"/v1/adapters/{caller.name_of(info)}"}
        return JSONResponse(adapter_json(caller, info), status_code=201, headers=location)

    @router.get("")
    async def list_adapters(
        request: Request,
        limit: Limit = PAGE_MAX,
        after: str | None = None,
        prefix: Prefix = "",
        shared: bool = False,
        owner: str | None = None,
    ) -> Json:
        caller = caller_of(request)
        whose = caller.owner if owner is None else owner
        if whose != caller.owner:
            caller.must_be_admin(_LIST_OWNER)
        with names_from("after"):
            if shared:
                if prefix:
                    raise InvalidRequest("`prefix` does not go with `shared`", param="prefix")
                infos, following = await services.lookup(
                    lambda: library.list_shared(limit=limit, after=after, owner=whose),
                    owner=caller.owner,
                )
            else:
                infos, following = await services.lookup(
                    lambda: library.list(limit=limit, after=after, prefix=prefix, owner=whose),
                    owner=caller.owner,
                )
        return {
            "object": "list",
            "data": [adapter_json(caller, info) for info in infos],
            "has_more": following is not None,
            "next": following,
        }

    # Before `/{name}`, which takes every path.
    @router.get("/{name:path}/versions")
    async def list_versions(name: str, request: Request) -> Json:
        caller = caller_of(request)
        owner, reference = caller.acts_on(name)
        infos = await services.lookup(
            lambda: library.versions(reference, owner=owner), owner=caller.owner
        )
        return {"object": "list", "data": [adapter_json(caller, info) for info in infos]}

    @router.post("/{name:path}/activate")
    async def activate_version(name: str, body: ActivateRequest, request: Request) -> Json:
        caller, owner, own = _writing(request, name)
        info = await services.lookup(
            lambda: library.activate(own, body.version, owner=owner), owner=caller.owner
        )
        return adapter_json(caller, info)

    @router.put("/{name:path}/tags")
    async def tag_adapter(name: str, body: TagsRequest, request: Request) -> Json:
        caller, owner, own = _writing(request, name)
        info = await services.lookup(
            lambda: library.tag(own, body.tags, owner=owner), owner=caller.owner
        )
        return adapter_json(caller, info)

    @router.get("/{name:path}/shares")
    async def list_shares(name: str, request: Request) -> Json:
        caller = caller_of(request)
        owner, own = caller.acts_on(name)
        grantees = await services.lookup(
            lambda: library.grantees(own, owner=owner), owner=caller.owner
        )
        return {"object": "list", "data": [{"owner": who or EVERYBODY} for who in grantees]}

    @router.put("/{name:path}/shares/{grantee}", status_code=204)
    async def share_adapter(name: str, grantee: str, request: Request) -> Response:
        caller, owner, own = _writing(request, name)
        whom = None if grantee == EVERYBODY else grantee
        await services.lookup(lambda: library.share(own, whom, owner=owner), owner=caller.owner)
        return Response(status_code=204)

    @router.delete("/{name:path}/shares/{grantee}", status_code=204)
    async def unshare_adapter(name: str, grantee: str, request: Request) -> Response:
        caller, owner, own = _writing(request, name)
        whom = None if grantee == EVERYBODY else grantee
        await services.lookup(lambda: library.unshare(own, whom, owner=owner), owner=caller.owner)
        return Response(status_code=204)

    @router.get("/{name:path}")
    async def show_adapter(name: str, request: Request) -> Json:
        caller = caller_of(request)
        owner, reference = caller.acts_on(name)
        info = await services.lookup(
            lambda: library.resolve(reference, owner=owner), owner=caller.owner
        )
        return adapter_json(caller, info)

    @router.delete("/{name:path}", status_code=204)
    async def delete_adapter(name: str, request: Request) -> Response:
        caller, owner, own = _writing(request, name)
        await services.lookup(lambda: library.delete(own, owner=owner), owner=caller.owner)
        return Response(status_code=204)

    return router


def adapter_json(caller: Caller, info: "AdapterInfo") -> Json:
    """One version as JSON. Whom it is shared with does not learn how it is used."""
    shown: Json = {
        "object": "adapter",
        "name": caller.name_of(info),
        "owner": info.owner,
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
    if caller.sees_all_of(info):
        shown["tags"] = dict(info.tags)
        shown["used"] = None if info.used is None else int(info.used)
    return shown


def _writing(request: Request, name: str) -> tuple[Caller, str, str]:
    """The caller, if it may change adapters at all, and the owner and name that it means."""
    caller = caller_of(request)
    caller.must_write()
    return caller, *caller.acts_on(name)
