"""Puts the HTTP side together: middleware, error handlers, routes, lifespan. Nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import shoal
from shoal.server.http import errors
from shoal.server.http.adapters_api import adapters_router
from shoal.server.http.auth import Authenticate
from shoal.server.http.chat import chat_router
from shoal.server.http.completions import completions_router
from shoal.server.http.health import health_router
from shoal.server.http.limits import Admit, LimitBody
from shoal.server.http.lora_api import lora_router
from shoal.server.http.models_api import models_router
from shoal.server.http.services import Services
from shoal.server.http.tokens_api import tokens_router


def create_app(services: Services) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine, and at the end drains and stops it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await services.engine.start()
        try:
            yield
        finally:
            # `serving.py` has drained before; under a bare uvicorn the wait is here.
            await services.drain(0 if services.draining else services.config.shutdown_timeout)
            await services.engine.stop()

    app = FastAPI(
        title="shoal",
        version=shoal.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(app, services)
    for make_router in (
        health_router,
        models_router,
        chat_router,
        completions_router,
        adapters_router,
        lora_router,
        tokens_router,
    ):
        app.include_router(make_router(services))
    # The last one added is the outermost.
    app.add_middleware(LimitBody, max_bytes=services.config.max_body_bytes)
    app.add_middleware(Authenticate, services=services, static=services.config.api_key)
    app.add_middleware(Admit, services=services)
    return app
