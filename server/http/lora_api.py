"""vLLM's ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, for scripts that use them.

Loading reads a folder of the server's own disk, so it is off until ``--lora-root`` names the one
folder it may read from, and no path, link or ``..`` leads out of that.
"""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from shoal.server.errors import Forbidden, InvalidRequest
from shoal.server.http.adapter_errors import names_from
from shoal.server.http.caller import caller_of
from shoal.server.http.schemas import LoadLoraRequest, UnloadLoraRequest
from shoal.server.http.services import Services


def lora_router(services: Services) -> APIRouter:
    """The two routes."""
    router = APIRouter()
    library = services.library

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadLoraRequest, request: Request) -> PlainTextResponse:
        root, owner, name = _allowed(services, request, body.lora_name)

        def load() -> None:
            library.upload(name, adapter_files(root, body.lora_path), owner=owner)

        with names_from("lora_name"):
            await services.work(load, owner=caller_of(request).owner)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadLoraRequest, request: Request) -> PlainTextResponse:
        _, owner, name = _allowed(services, request, body.lora_name)
        await services.lookup(
            lambda: library.delete(name, owner=owner), owner=caller_of(request).owner
        )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def adapter_files(root: Path, path: str) -> dict[str, Path]:
    """The adapter's files in the folder ``path``, which must lie inside ``root``.

    Raises:
        Forbidden: it, or one of its files, is outside.
        InvalidRequest: it is no folder, or holds no adapter.
    """
    if "\0" in path:
        raise InvalidRequest("`lora_path` holds a NUL character", param="lora_path")
    try:
        return _found(root.resolve(), path)
    except (OSError, RuntimeError) as error:  # not readable, a name too long, a loop of links
        raise InvalidRequest("`lora_path` cannot be read", param="lora_path") from error


def _found(root: Path, path: str) -> dict[str, Path]:
    folder = (root / path).resolve()
    _require_inside(folder, root)
    if not folder.is_dir():
        raise InvalidRequest(
            f"`lora_path` is {path[:200]!r}: must be a folder inside --lora-root",
            param="lora_path",
        )
    # Only what an adapter consists of: a run folder also holds logs, pictures and checkpoints.
    found = [entry for entry in sorted(folder.iterdir()) if entry.name.startswith("adapter_")]
    files = {entry.name: entry.resolve() for entry in found if entry.is_file()}
    for file in files.values():
        _require_inside(file, root)
    if not files:
        raise InvalidRequest(
            f"`lora_path` is {path[:200]!r}: holds no adapter_config.json", param="lora_path"
        )
    return files


def _allowed(services: Services, request: Request, reference: str) -> tuple[Path, str, str]:
    """The root, and the owner and name that ``reference`` means."""
    caller = caller_of(request)
    # The folder may hold everybody's adapters.
    caller.must_be_admin("load adapters from the server's disk")
    return _allowed_root(services), *caller.acts_on(reference)


def _allowed_root(services: Services) -> Path:
    root = services.config.lora_root
    if root is None:
        raise Forbidden(
            "loading adapters from the server's disk is off: start it with --lora-root DIR, or"
            " upload to POST /v1/adapters"
        )
    return Path(root)


def _require_inside(path: Path, root: Path) -> None:
    if not path.is_relative_to(root):
        raise Forbidden("`lora_path` leads out of --lora-root", param="lora_path")
