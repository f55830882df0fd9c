"""Messages arrive whole and in order, however the bytes come; a broken pipe is said once."""

import asyncio
import pickle
import socket
import struct

from shoal.server.workers.pipe import Pipe


class End:
    """What one end of a pipe heard."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.losses = 0
        self.changed = asyncio.Event()

    def received(self, message: object) -> None:
        self.heard.append(message)
        self.changed.set()

    def lost(self) -> None:
        self.losses += 1
        self.changed.set()

    async def until(self, count: int) -> None:
        while len(self.heard) < count and not self.losses:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 30)


async def make() -> tuple[Pipe, End, Pipe, End]:
    a, b = socket.socketpair()
    one, other = End(), End()
    return (
        await Pipe.over(a, one.received, one.lost),
        one,
        await Pipe.over(b, other.received, other.lost),
        other,
    )


def test_messages_of_both_directions_keep_their_order() -> None:
    async def check() -> None:
        here, heard_here, there, heard_there = await make()
        sent = [("x" * size, size) for size in (0, 1, 70_000, 3, 1_000_000)]
        for message in sent:
            here.send(message)
            await asyncio.sleep(0)
            there.send(message)
        await heard_here.until(len(sent))
        await heard_there.until(len(sent))
        assert heard_here.heard == heard_there.heard == sent
        here.close()

    asyncio.run(check())


def test_bytes_may_come_in_any_pieces() -> None:
    async def check() -> None:
        ours, theirs = socket.socketpair()
        end = End()
        await Pipe.over(ours, end.received, end.lost)
        frames = b""
        for messages in ([1, 2], [], [{"three": 3}]):
            data = pickle.dumps(messages)
            frames += struct.pack("<Q", len(data)) + data
        theirs.setblocking(False)
        for at in range(len(frames)):
            theirs.send(frames[at : at + 1])
            await asyncio.sleep(0)
        await end.until(3)
        assert end.heard == [1, 2, {"three": 3}]
        theirs.close()
        await end.until(4)
        assert end.losses == 1

    asyncio.run(check())


def test_what_is_sent_before_closing_arrives_and_later_sends_do_nothing() -> None:
    async def check() -> None:
        here, heard_here, there, heard_there = await make()
        here.send("last words")
        here.close()
        await heard_there.until(1)
        assert heard_there.heard == ["last words"]
        await heard_there.until(2)
        await asyncio.sleep(0)
        assert (heard_here.losses, heard_there.losses) == (1, 1)
        assert not here.open
        there.send("too late")

    asyncio.run(check())


def test_what_cannot_be_said_breaks_the_pipe() -> None:
    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        here, heard_here, _, heard_there = await make()
        here.send("somebody waits for this")
        here.send(lambda: "nothing that can be pickled")
        await heard_here.until(1)
        await heard_there.until(1)
        assert (heard_here.losses, heard_there.losses) == (1, 1)

    asyncio.run(check())
