"""One authenticated control connection: a line of JSON at a time over TCP, after both sides proved the job's secret."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from typing import Any

from elastic_hpc import protocol

HANDSHAKE_TIMEOUT = 5.0
_SLOW_READER = 4 * protocol.MAX_LINE


class Channel:
    """An open connection. ``peer`` and ``local`` are the numeric addresses of its two ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.peer: str = writer.get_extra_info("peername")[0].removeprefix("::ffff:")
        self.local: str = writer.get_extra_info("sockname")[0].removeprefix("::ffff:")
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read(self) -> bytes:
        """The next line. Raises ProtocolError for one that is too long, ConnectionError at the end."""
        try:
            line = await self._reader.readline()
        except ValueError as error:
            raise protocol.ProtocolError("a line is too long") from error
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the connection was closed")
        return line

    def send(self, message: Any) -> None:
        """Queue ``message``; never blocks. A peer that does not read is given up."""
        if self._writer.transport.get_write_buffer_size() > _SLOW_READER:
            self.close()
        elif not self._writer.is_closing():
            self._writer.write(protocol.encode(message))

    def close(self) -> None:
        self._writer.transport.abort()

    async def flush(self) -> None:
        """Wait until what was sent has left, then close."""
        try:
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()
        except OSError:
            self.close()


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> Channel:
    """The leader's side of the handshake. Raises ProtocolError, ConnectionError or TimeoutError for a stranger."""
    channel = Channel(reader, writer)
    mine = protocol.new_nonce()
    channel.send({"challenge": mine})
    answer = protocol.decode(await asyncio.wait_for(channel.read(), HANDSHAKE_TIMEOUT))
    theirs = str(answer.get("challenge"))
    protocol.check_proof(secret, "agent", mine, theirs, answer.get("proof"))
    channel.send({"proof": protocol.proof(secret, "leader", theirs, mine)})
    return channel


async def connect(addresses: Iterable[str], port: int, secret: bytes) -> Channel:
    """Dial the leader at the first of ``addresses`` that answers. Raises OSError, ProtocolError or TimeoutError with
    what the last one said.
    """
    problem: Exception = ConnectionRefusedError("no address to dial")
    for address in addresses:
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(address, port, limit=protocol.MAX_LINE), HANDSHAKE_TIMEOUT
            )
        except (OSError, asyncio.TimeoutError) as error:
            problem = error
            continue
        channel = Channel(reader, writer)
        try:
            hello = protocol.decode(await asyncio.wait_for(channel.read(), HANDSHAKE_TIMEOUT))
            theirs, mine = str(hello.get("challenge")), protocol.new_nonce()
            channel.send({"challenge": mine, "proof": protocol.proof(secret, "agent", theirs, mine)})
            answer = protocol.decode(await asyncio.wait_for(channel.read(), HANDSHAKE_TIMEOUT))
            protocol.check_proof(secret, "leader", mine, theirs, answer.get("proof"))
        except (OSError, asyncio.TimeoutError, protocol.ProtocolError) as error:
            channel.close()
            problem = error
            continue
        return channel
    raise problem
