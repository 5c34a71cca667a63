"""One authenticated control connection: a line of JSON at a time over TCP, after both sides proved the job's secret."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership import messages
from elastic_hpc.network import proofs
from elastic_hpc.network.addresses import BACKLOG

HANDSHAKE_TIMEOUT = 5.0
"""Seconds that a peer has for each message of the handshake."""

_MOST_STRANGERS = 2048
"""The most connections that may be in their handshake, or half of the files that this process may open; if there are
more, the oldest is closed. A thousand agents dial at once when their leader is lost.
"""
_SLOW_READER = 4 * messages.MAX_LINE
"""Most bytes that may wait to be sent to a peer: with more, its connection is closed."""


class Link(Protocol):
    """An open control connection: a ``Channel``, or a simulated one. ``peer`` and ``local`` are the numeric addresses
    of its two ends.
    """

    peer: str
    local: str

    async def read(self) -> bytes: ...
    def send(self, *sent: messages.Message) -> None: ...
    def close(self) -> None: ...


class Channel:
    """A ``Link`` over TCP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Raises OSError if the peer has reset the connection already."""
        self._reader, self._writer = reader, writer
        peer, local = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
        if not peer or not local:
            raise ConnectionResetError("the connection was reset")
        self.peer: str = peer[0].removeprefix("::ffff:")
        self.local: str = local[0].removeprefix("::ffff:")
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read(self) -> bytes:
        """The next line. Raises ProtocolError for a line that is too long, ConnectionError at the end."""
        try:
            line = await self._reader.readline()
        except ValueError as error:
            raise messages.ProtocolError("a line is too long") from error
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the connection was closed")
        return line

    def send(self, *sent: messages.Message) -> None:
        """Queue messages; never blocks. Closes the connection if the peer does not read."""
        if self._writer.transport.get_write_buffer_size() > _SLOW_READER:
            self.close()
        elif not self._writer.is_closing():
            self._writer.write(b"".join(map(messages.encode, sent)))

    def close(self) -> None:
        self._writer.transport.abort()

    async def flush(self) -> None:
        """Wait until all that was sent has left this process, then close."""
        try:
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()
        except OSError:
            self.close()


class Network:
    """The control connections of one agent: those that it accepts on ``listeners``, and those that it dials.

    ``secret`` gives the job's secret, and may raise ElasticError as long as there is none.
    """

    def __init__(
        self, listeners: Sequence[socket.socket], secret: Callable[[], Awaitable[bytes]], dial_timeout: float
    ) -> None:
        self._listeners = listeners
        self._servers: list[asyncio.AbstractServer] = []
        self._secret = secret
        self._dial_timeout = dial_timeout
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        """Connections in their handshake, the oldest first."""
        self.on_stranger: Callable[[str, str], None] = lambda _addr, _reason: None
        """Called with the address of a peer that was refused, and the reason."""

    async def serve(self, attend: Callable[[Channel], Awaitable[None]]) -> None:
        """Accept connections from now on; ``attend`` gets each peer that holds the secret."""

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._strangers[writer] = None
            if len(self._strangers) > most_strangers():
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]  # at once: its own task ends later
                oldest.transport.abort()
            try:
                channel = await self._accept(reader, writer)
            except (OSError, asyncio.TimeoutError, messages.ProtocolError, ElasticError) as error:
                writer.transport.abort()
                if isinstance(error, messages.ProtocolError):  # agents too may close their connections early
                    self.on_stranger(str(writer.get_extra_info("peername")), str(error))
                return
            finally:
                self._strangers.pop(writer, None)
            try:
                await attend(channel)
            finally:
                channel.close()

        for listener in self._listeners:
            self._servers.append(await asyncio.start_server(on_connection, sock=listener, limit=messages.MAX_LINE))
            # asyncio has shortened the backlog to 100. With a longer backlog as its argument, asyncio would try to
            # accept that many connections at a time, even when no more files can be opened, and log each failure.
            listener.listen(BACKLOG)

    def close(self) -> None:
        """Accept no more connections."""
        for server in self._servers:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Channel:
        channel = Channel(reader, writer)
        secret = await self._secret()
        mine = proofs.new_nonce()
        channel.send({"challenge": mine})
        answer = messages.decode(await asyncio.wait_for(channel.read(), HANDSHAKE_TIMEOUT))
        theirs = str(answer.get("challenge"))
        proofs.check_proof(secret, "agent", mine, theirs, answer.get("proof"))
        channel.send({"proof": proofs.proof(secret, "leader", theirs, mine)})
        return channel

    async def dial(self, addresses: Sequence[str], port: int) -> Channel:
        """Connect to an agent. Raises OSError, ProtocolError, ElasticError or TimeoutError with what went wrong."""
        return await connect(addresses, port, await self._secret(), timeout=self._dial_timeout)


def most_strangers() -> int:
    """How many connections may be in their handshake at a time."""
    return min(_MOST_STRANGERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


async def connect(addresses: Sequence[str], port: int, secret: bytes, *, timeout: float = HANDSHAKE_TIMEOUT) -> Channel:
    """Connect to the first of ``addresses`` that answers within ``timeout`` seconds. Raises the OSError, ProtocolError
    or TimeoutError of the last address.
    """
    problem: Exception = ConnectionRefusedError("no address to dial")
    for address in addresses:
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(address, port, limit=messages.MAX_LINE), timeout
            )
        except (OSError, asyncio.TimeoutError) as error:
            problem = error
            continue
        try:
            channel = Channel(reader, writer)
            hello = messages.decode(await asyncio.wait_for(channel.read(), timeout))
            theirs, mine = str(hello.get("challenge")), proofs.new_nonce()
            channel.send({"challenge": mine, "proof": proofs.proof(secret, "agent", theirs, mine)})
            answer = messages.decode(await asyncio.wait_for(channel.read(), timeout))
            proofs.check_proof(secret, "leader", mine, theirs, answer.get("proof"))
        except (OSError, asyncio.TimeoutError, messages.ProtocolError) as error:
            writer.transport.abort()
            problem = error
            continue
        return channel
    raise problem
