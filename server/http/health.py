"""``GET /health``, ``/version`` and ``/metrics``: open also when keys are required.

Once there are tenants ``/metrics`` names them and their adapters, and is an admin's alone.
"""

import anyio.to_thread
from fastapi import APIRouter, Request, Response

import shoal
from shoal.server.errors import Draining, EngineFailure
from shoal.server.http.caller import caller_of
from shoal.server.http.errors import error_response
from shoal.server.http.metrics import CONTENT_TYPE
from shoal.server.http.services import Services


def health_router(services: Services) -> APIRouter:
    """The three routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        if services.draining:
            return error_response(Draining("the server is shutting down"))
        if not await services.alive():
            response = error_response(EngineFailure("the engine does not run"))
            response.status_code = 503
            return response
        return Response(status_code=200)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": shoal.__version__}

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        # Here and not by the path: a path that is written in another way comes here too.
        caller_of(request).must_be_admin("read metrics")
        text = await anyio.to_thread.run_sync(services.counts.render)
        return Response(text, media_type=CONTENT_TYPE)

    return router
