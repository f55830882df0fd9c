"""A network between two ends that can be cut, or that stops passing anything on."""

import select
import socket
import threading
from types import TracebackType


class Proxy:
    """Listens on a TCP port and passes on to ``target``, in both directions.

    Args:
        target: (host, port), or the path of a Unix socket.

    Attributes:
        stalled: while set, connections are accepted and nothing is passed on.
        refusing: while set, whoever connects is cut off at once.
    """

    def __init__(self, target: tuple[str, int] | str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.stalled = threading.Event()
        self.refusing = threading.Event()
        self._closing = threading.Event()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            if self.refusing.is_set():
                self._drop(list(self._pairs))
            if self.stalled.wait(0.0):
                self._closing.wait(0.01)
                continue
            for ready in select.select([self._listener, *self._pairs], [], [], 0.02)[0]:
                if ready is self._listener:
                    self._accept()
                elif ready in self._pairs:
                    self._pass_on(ready)
        self._drop(list(self._pairs))

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self.refusing.is_set():
            near.close()
            return
        if isinstance(self._target, str):
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
        else:
            far = socket.create_connection(self._target)
        self._pairs |= {near: far, far: near}

    def _pass_on(self, ready: socket.socket) -> None:
        try:
            data = ready.recv(1 << 16)
            if data:
                self._pairs[ready].sendall(data)
                return
        except OSError:
            pass
        self._drop([ready])

    def _drop(self, ends: list[socket.socket]) -> None:
        for end in ends:
            other = self._pairs.pop(end, None)
            if other is not None:
                self._pairs.pop(other, None)
                end.close()
                other.close()
