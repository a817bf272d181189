"""A proxy between a client and a server that misbehaves as networks do: slow, cut, half-open, late, answers lost."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from enum import Enum, auto
from pathlib import Path

_CHUNK_BYTES = 65_536


class _Fate(Enum):
    PASS = auto()
    SWALLOW = auto()
    HOLD = auto()


class _Way:
    """One direction of a link. What it doesn't pass on includes the news that the sender has gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.fate = _Fate.PASS
        self.held = bytearray()
        self.bytes_read = 0
        self.noise: random.Random | None = None

    def put(self, data: bytes) -> None:
        if self.noise:
            place = self.noise.randrange(len(data))
            data = data[:place] + self.noise.randbytes(1) + data[place + 1 :]
        if self.fate is _Fate.HOLD:
            self.held += data
        elif self.fate is _Fate.PASS:
            self.writer.write(data)


class Link:
    """One connection through the proxy. Every method takes effect at once, on what has not been passed on yet."""

    def __init__(self, requests: _Way, answers: _Way) -> None:
        self.requests = requests
        self.answers = answers
        self.cut_due = False

    @property
    def bytes_answered(self) -> int:
        """How much has come from the server, passed on or not."""
        return self.answers.bytes_read

    def cut(self) -> None:
        """Break the connection, on both sides."""
        for way in (self.requests, self.answers):
            way.fate = _Fate.SWALLOW
            way.writer.transport.abort()

    def swallow(self) -> None:
        """Half-open: both sides believe that they are connected, and nothing arrives any more."""
        self.requests.fate = self.answers.fate = _Fate.SWALLOW

    def swallow_requests(self) -> None:
        """Let nothing more through to the server."""
        self.requests.fate = _Fate.SWALLOW

    def swallow_answers(self) -> None:
        """Let requests through to the server, and nothing back."""
        self.answers.fate = _Fate.SWALLOW

    def hold(self) -> None:
        """Keep requests back until `release`, and from the server that the client has gone, if it does."""
        self.requests.fate = _Fate.HOLD

    def cut_at_answer(self) -> None:
        """Let requests through, and break the connection in place of the next answer."""
        self.cut_due = True

    def garble(self) -> None:
        """Say something to the client that no server of its protocol says: "x", without content."""
        self.answers.put(b"x\0\0\0\4")

    def corrupt_answers(self, noise: random.Random) -> None:
        """Change a byte of each packet from the server."""
        self.answers.noise = noise

    def release(self) -> None:
        """Deliver to the server, late, what was held."""
        self.requests.fate = _Fate.PASS
        self.requests.put(bytes(self.requests.held))
        self.requests.held.clear()


class FaultProxy:
    """Listens on 127.0.0.1:`port` and connects to `server`, a unix socket or a host and port.

    `latency_seconds`: how long each packet takes, each way. `greet`: what is done to each new link; `Link.cut` lets
    nobody connect. `links`: those whose ends are both open or have been kept from learning otherwise.
    """

    def __init__(self, server: Path | tuple[str, int]) -> None:
        self.port = 0
        self.latency_seconds = 0.0
        self.greet: Callable[[Link], None] | None = None
        self.links: list[Link] = []
        self._server = server
        self._strikes: list[tuple[bytes, Callable[[Link], None], asyncio.Future[Link]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FaultProxy"]:
        """Listen; at the end every link is cut."""
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            self.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection there is."""
        for link in list(self.links):
            link.cut()

    def strike(self, words: bytes, fault: Callable[[Link], None]) -> asyncio.Future[Link]:
        """Do `fault`, once, to the link on which the next request with `words` in it comes, before it is passed on.

        Gives the link when it has struck.
        """
        struck: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._strikes.append((words, fault, struck))
        return struck

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer.transport):
            try:
                if isinstance(self._server, Path):
                    server_reader, server_writer = await asyncio.open_unix_connection(self._server)
                else:
                    server_reader, server_writer = await asyncio.open_connection(*self._server)
            except OSError:
                return
            with contextlib.closing(server_writer.transport):
                requests = _Way(reader, server_writer)
                answers = _Way(server_reader, writer)
                link = Link(requests, answers)
                self.links.append(link)
                try:
                    if self.greet:
                        self.greet(link)
                    await asyncio.gather(self._pump(link, requests), self._pump(link, answers))
                finally:
                    self.links.remove(link)

    async def _pump(self, link: Link, way: _Way) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await way.reader.read(_CHUNK_BYTES):
                if self.latency_seconds:
                    await asyncio.sleep(self.latency_seconds)
                way.bytes_read += len(data)
                if way is link.requests:
                    self._strike(link, data)
                elif link.cut_due:
                    link.cut()
                way.put(data)
                if way.fate is _Fate.PASS:
                    await way.writer.drain()
        if way.fate is _Fate.PASS:
            way.writer.close()

    def _strike(self, link: Link, data: bytes) -> None:
        due = [strike for strike in self._strikes if strike[0] in data]
        for strike in due:
            self._strikes.remove(strike)
            _, fault, struck = strike
            fault(link)
            if not struck.done():
                struck.set_result(link)
