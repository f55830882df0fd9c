"""Answers on a kept-alive connection took 40 ms more: accepted sockets had Nagle's algorithm on."""

import asyncio
import socket

from shoal.server.config import ServeConfig
from shoal.server.http.serving import listen, new_loop


def test_accepted_connections_send_at_once() -> None:
    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_connect(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken: socket.socket = writer.get_extra_info("socket")
            found.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen(ServeConfig(port=0))
        async with await asyncio.start_server(on_connect, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            value = await asyncio.wait_for(found, 60)
            writer.close()
            await writer.wait_closed()
        return value

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(accepted()) != 0
