"""Receives one multipart upload onto disk, within limits, and removes it afterwards.

Bytes are counted as they arrive (a Content-Length is only a hint), file names never become paths,
and nothing is kept: the files live in a temporary folder (``spool.py``) for as long as the block
runs.
"""

import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import anyio.to_thread
import python_multipart
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.server.errors import BodyTooLarge, InvalidRequest, Overloaded
from shoal.server.http.spool import spool

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

UPLOADS_MAX = 64
UPLOADS_OF_ONE_MAX = 32
FILES_MAX = 16
_FIELD_BYTES_MAX = 4096
_HEADER_BYTES_MAX = 4096
_FILE_NAME_MAX = 255
# Of a body that are in memory before they are written.
GATHER_BYTES = 1 << 20
# Part headers and borders around the files.
_ENVELOPE_BYTES = (FILES_MAX + 2) * 8192


class Uploads:
    """How many uploads are under way: their bodies lie on the server's disk meanwhile.

    Args:
        most: at a time.
        most_of_one: likewise, of one owner, so that it leaves others room.
    """

    def __init__(self, most: int = UPLOADS_MAX, most_of_one: int = UPLOADS_OF_ONE_MAX) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._begun: Counter[str] = Counter()

    @property
    def under_way(self) -> int:
        return self._begun.total()

    @contextmanager
    def begin(self, owner: str) -> Iterator[None]:
        """Raise Overloaded if there are too many; else it is under way inside the block."""
        if self._begun[owner] >= self._most_of_one or self.under_way >= self._most:
            raise Overloaded("too many uploads are under way; try again in 1 s")
        self._begun[owner] += 1
        try:
            yield
        finally:
            self._begun[owner] -= 1
            if not self._begun[owner]:
                del self._begun[owner]


@dataclass(slots=True)
class Upload:
    """What was sent: the adapter's name, and file name -> where it lies."""

    name: str
    files: dict[str, Path] = field(default_factory=dict)
    folder: Path | None = None

    def remove(self) -> None:
        """Remove the files; they are anyway when the block ends, but on the event loop."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@asynccontextmanager
async def received(request: Request, *, max_bytes: int) -> AsyncIterator[Upload]:
    """The upload in ``request``'s body.

    Raises:
        InvalidRequest: not the multipart form that was asked for.
        BodyTooLarge: the files together exceed ``max_bytes``.
        BodyTooSlow: it does not come.
        RegistryUnavailable: the temporary files cannot be written.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("the body must be multipart/form-data with `name` and `file` parts")
    _check_declared(request, max_bytes)
    form = _Form(max_bytes)
    try:
        yield await _receive(request, boundary, form, max_bytes)
    finally:
        # Not in a thread: it must happen also when this request is being cancelled.
        form.remove()


def _check_declared(request: Request, max_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes + _ENVELOPE_BYTES:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the upload is larger than {max_bytes} bytes, the limit (--max-upload-bytes)",
        param="file",
    )


async def _receive(request: Request, boundary: bytes, form: "_Form", max_bytes: int) -> Upload:
    total = 0
    gathered = bytearray()

    async def parse() -> None:
        # In a thread: it writes to disk. Not for each chunk, since switching to one takes time too.
        data = bytes(gathered)
        gathered.clear()
        with _disk_failures():
            await anyio.to_thread.run_sync(parser.write, data)

    try:
        parser = python_multipart.MultipartParser(
            boundary, form.callbacks(), max_header_size=_HEADER_BYTES_MAX
        )
        async for chunk in request.stream():
            total += len(chunk)
            if total > max_bytes + _ENVELOPE_BYTES:
                raise _too_large(max_bytes)
            gathered += chunk
            if len(gathered) >= GATHER_BYTES:
                await parse()
        await parse()
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"the multipart body cannot be read: {error}") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the upload ended before it was complete") from error
    finally:
        with _disk_failures():
            form.close()
    return form.result()


@contextmanager
def _disk_failures() -> Iterator[None]:
    """What the operator must mend, such as a full disk; the caller may try again."""
    try:
        yield
    except OSError as error:
        raise RegistryUnavailable(f"an upload could not be received: {error}") from error


class _Form:
    """The parser's callbacks: collects the ``name`` field and writes ``file`` parts to disk."""

    def __init__(self, max_bytes: int) -> None:
        self._folder: Path | None = None
        self._max_bytes = max_bytes
        self._written = 0
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._field = ""
        self._value = bytearray()
        self._output: BinaryIO | None = None
        self._names: list[str] = []
        self._files: dict[str, Path] = {}
        self._complete = False

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def remove(self) -> None:
        """Remove the files."""
        if self._folder is not None and self._folder.exists():
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None

    def result(self) -> Upload:
        if not self._complete:
            raise InvalidRequest("the multipart body ends before its closing boundary")
        if not self._names:
            raise InvalidRequest("`name` was not sent: must be there once", param="name")
        if not self._files:
            raise InvalidRequest("no `file` part was sent: must be at least one", param="file")
        return Upload(self._names[0], self._files, self._folder)

    def _begin(self) -> None:
        self._disposition = b""
        self._header_name, self._header_value = b"", b""
        self._value = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name, self._header_value = b"", b""

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == "name":
            if self._names:  # now: what is kept of them until the end would be in memory
                raise InvalidRequest("`name` was sent twice: must be there once", param="name")
            return
        if self._field != "file":
            shown = self._field[:64]
            raise InvalidRequest(
                f"unknown part {shown!r}: the form takes `name` and `file`", param=shown or None
            )
        if len(self._files) >= FILES_MAX:
            raise InvalidRequest(f"more than {FILES_MAX} `file` parts were sent", param="file")
        name = _file_name(self._disposition, options.get(b"filename", b""))
        if name in self._files:
            raise InvalidRequest(f"the file {name!r} was sent twice", param="file")
        if self._folder is None:
            self._folder = spool().new_folder()
        # Numbered: the client's name is never a path.
        path = self._folder / f"part-{len(self._files)}"
        self._files[name] = path
        self._output = path.open("wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._output is None:
            self._value += data[start:end]
            if len(self._value) > _FIELD_BYTES_MAX:
                raise InvalidRequest(
                    f"`name` is longer than {_FIELD_BYTES_MAX} bytes", param="name"
                )
            return
        self._written += end - start
        if self._written > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._output.write(data[start:end])

    def _end(self) -> None:
        if self._output is None:
            self._names.append(self._value.decode("utf-8", "replace"))
        self.close()

    def _finish(self) -> None:
        self._complete = True


def _file_name(disposition: bytes, raw: bytes) -> str:
    """The file's name as the client sent it, which must be a plain name."""
    name = raw.decode("utf-8", "replace")
    plain = name not in ("", ".", "..") and len(name) <= _FILE_NAME_MAX and name.isprintable()
    # The parser has cut a Windows path down to its last part; the header still shows it.
    if not plain or "/" in name or "\\" in name or b":\\" in disposition:
        raise InvalidRequest(
            f"the file name {name[:64]!r} must be a plain name such as adapter_config.json,"
            " without a path",
            param="file",
        )
    return name
