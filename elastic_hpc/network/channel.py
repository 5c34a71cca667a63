"""One authenticated control connection: a line of JSON at a time over TCP, after both ends have proved who they are.

``proofs`` says what is proved, and what is not.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from elastic_hpc.errors import ElasticError
from elastic_hpc.membership import messages
from elastic_hpc.membership.roster import Host
from elastic_hpc.network import addresses
from elastic_hpc.network.identity import Identity, RunIsOver
from elastic_hpc.network.proofs import MAC_SIZE, Handshake, Seal, new_nonce
from elastic_hpc.network.tasks import within

log = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT = 5.0
"""Seconds that the handshake may take."""

HANDSHAKE_LINE = 1024
"""Longest line, in bytes, of a peer that has yet to prove itself; no more of what it sends is read."""

MOST_STRANGERS_OF_ONE_ADDRESS = 128
"""The most connections from one address that may be in their handshake; if there are more, the oldest is closed."""

_MOST_STRANGERS = 2048
"""The most connections that may be in their handshake, or half of the files that this process may open; if there are
more, the oldest is closed. A thousand agents dial at once when their leader is lost.
"""
_SLOW_READER = 4 * messages.MAX_LINE
"""Most bytes that may wait to be sent to a peer: with more, its connection is closed."""

_REACH_TIMEOUT = 2.5
"""Seconds that ``Network.reaches`` takes at most: the kernel repeats a lost packet after 1 s."""

_OWN_LACK = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN})
"""Errors that say nothing about the network."""

_ACCEPTED_AT_ONCE = 64
"""Number of connections to accept before the accepted ones are served."""


class Link(Protocol):
    """An open control connection: a ``Channel``, or a simulated one. ``identity`` is what the peer has proved to be;
    ``peer`` and ``local`` are the numeric addresses of the two ends.
    """

    identity: Identity
    peer: str
    local: str

    async def read(self) -> bytes: ...
    def send(self, *sent: messages.Message) -> None: ...
    def close(self) -> None: ...


class Channel:
    """A ``Link`` over TCP."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, identity: Identity, sent: Seal, received: Seal
    ) -> None:
        """``sent`` and ``received``: the MACs of the two directions. Raises OSError if the peer has reset the
        connection already.
        """
        self._reader, self._writer = reader, writer
        self._sent, self._received = sent, received
        self.identity = identity
        peer, local = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
        if not peer or not local:
            raise ConnectionResetError("the connection was reset")
        self.peer: str = peer[0]
        self.local: str = local[0]
        self.on_forgery: Callable[[str, str], None] = lambda _addr, _reason: None
        """Called with the peer's address and the reason for a line that the peer did not send, or that is out of order.
        """

    @classmethod
    async def of(cls, connection: socket.socket, identity: Identity, sent: Seal, received: Seal) -> Channel:
        """A channel over ``connection``, whose handshake is done. Raises OSError like ``__init__``."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader, writer = await asyncio.open_connection(sock=connection, limit=messages.MAX_LINE + MAC_SIZE)
        return cls(reader, writer, identity, sent, received)

    async def read(self) -> bytes:
        """The next line. Raises ProtocolError for a line that is too long or forged, ConnectionError at the end."""
        try:
            signed = await self._reader.readline()
        except ValueError as error:
            raise messages.ProtocolError("a line is too long") from error
        if not signed.endswith(b"\n"):
            raise ConnectionResetError("the connection was closed")
        try:
            return self._received.check(signed)
        except messages.ProtocolError as error:
            self.on_forgery(self.peer, str(error))
            raise

    def send(self, *sent: messages.Message) -> None:
        """Queue messages; never blocks. Closes the connection if the peer does not read."""
        if self._writer.transport.get_write_buffer_size() > _SLOW_READER:
            self.close()
        elif not self._writer.is_closing():
            lines = map(messages.encode, sent)
            self._writer.write(b"".join(part for line in lines for part in (self._sent.sign(line), line)))

    def close(self) -> None:
        self._writer.transport.abort()


class Network:
    """The control connections of the agent ``me``: it accepts connections on ``listeners``, and dials others.
    ``secret`` returns the job's secret, and may raise ElasticError while there is none.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        me: Identity,
        secret: Callable[[], Awaitable[bytes]],
        dial_timeout: float,
        workers_address: str = "",
    ) -> None:
        """``workers_address``: of the interface that the user has named for the workers, if any."""
        self._listeners = listeners
        self._workers_address = workers_address
        self._closed = False
        self._me = me
        self._secret = secret
        self._dial_timeout = dial_timeout
        self._tasks: set[asyncio.Task[None]] = set()
        """Each serves one connection."""
        self._strangers: dict[asyncio.Task[None], str] = {}
        """The tasks of connections in their handshake, the oldest first, with the addresses of the peers."""
        self._per_address = Counter[str]()
        """The number of connections in their handshake, by address."""
        self.on_stranger: Callable[[str, str], None] = lambda _addr, _reason: None
        """Called with the address of a peer that was refused, and the reason."""
        self.on_over: Callable[[RunIsOver], None] = lambda _over: None
        """Called when an agent of a later run has connected."""

    async def serve(self, attend: Callable[[Channel], Awaitable[None]]) -> None:
        """Accept connections from now on; ``attend`` gets each peer that has proved to belong to this run."""
        for listener in self._listeners:
            listener.settimeout(0)
            listener.listen(addresses.BACKLOG)
            self._accept_on(listener, attend)

    def close(self) -> None:
        """Accept no more connections."""
        self._closed = True
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket, attend: Callable[[Channel], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            for _ in range(_ACCEPTED_AT_ONCE):
                connection, address = listener.accept()
                connection.settimeout(0)
                task = loop.create_task(self._serve(connection, address[0], attend))
                self._tasks.add(task)  # the event loop itself does not keep tasks from being destroyed
                task.add_done_callback(partial(self._on_done, connection))
                self._add_stranger(task, address[0])
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("no connection can be accepted (%s); the next attempt follows in 1 s", error)
            loop.remove_reader(listener)
            loop.call_later(1.0, self._accept_on, listener, attend)

    def _accept_on(self, listener: socket.socket, attend: Callable[[Channel], Awaitable[None]]) -> None:
        if not self._closed:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener, attend)

    def _on_done(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        connection.close()  # also where the task was cancelled before it began

    def _add_stranger(self, task: asyncio.Task[None], address: str) -> None:
        self._strangers[task] = address
        self._per_address[address] += 1
        if self._per_address[address] > MOST_STRANGERS_OF_ONE_ADDRESS:
            oldest = next(task for task, other in self._strangers.items() if other == address)
        elif len(self._strangers) > most_strangers():
            oldest = next(iter(self._strangers))
        else:
            return
        self._remove_stranger(oldest)  # at once: the task itself ends later
        oldest.cancel()

    def _remove_stranger(self, task: asyncio.Task[None]) -> None:
        if address := self._strangers.pop(task, None):
            self._per_address[address] -= 1
            if not self._per_address[address]:
                del self._per_address[address]

    async def _serve(
        self, connection: socket.socket, address: str, attend: Callable[[Channel], Awaitable[None]]
    ) -> None:
        task = asyncio.current_task()
        assert task
        deadline = asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT, task.cancel)
        try:
            channel = await self._welcome(connection)
        except (OSError, asyncio.CancelledError, messages.ProtocolError, ElasticError, RunIsOver) as error:
            if isinstance(error, messages.ProtocolError):  # agents too may close their connections early
                self.on_stranger(address, str(error))
            elif isinstance(error, RunIsOver):
                self.on_over(error)
            return
        finally:
            deadline.cancel()
            self._remove_stranger(task)
        channel.on_forgery = self.on_stranger
        try:
            await attend(channel)
        finally:
            channel.close()

    async def _welcome(self, connection: socket.socket) -> Channel:
        secret = await self._secret()
        loop = asyncio.get_running_loop()
        challenge = messages.encode({"challenge": new_nonce()})
        handshake = Handshake(secret, challenge)
        await loop.sock_sendall(connection, challenge)
        answer = messages.decode(handshake.check("dialer", await _read_line(connection)))
        peer = Identity.of(answer.get("identity"))
        # before the peer is judged: this proves to an agent of an earlier run that its run is over
        await loop.sock_sendall(connection, handshake.sign("acceptor", messages.encode({"identity": vars(self._me)})))
        self._me.check(peer)
        return await Channel.of(connection, peer, handshake.seal("acceptor"), handshake.seal("dialer"))

    async def dial(self, host: Host) -> Channel:
        """Connect to the agent of ``host``. Raises RunIsOver, or OSError, ProtocolError, ElasticError or TimeoutError
        with what went wrong.
        """
        channel = await connect(host, self._me, await self._secret(), timeout=self._dial_timeout)
        channel.on_forgery = self.on_stranger
        return channel

    async def reaches(self, host: Host, local: str) -> bool:
        """See ``node.Transport``. Waits for no handshake: a slow agent says nothing about its network."""
        address = addresses.nearest(host.addresses, self._workers_address or local)
        try:
            await knock(address, host.port, _REACH_TIMEOUT)
        except (OSError, asyncio.TimeoutError) as error:
            return isinstance(error, OSError) and error.errno in _OWN_LACK
        return True


def most_strangers() -> int:
    """How many connections may be in their handshake at a time."""
    return min(_MOST_STRANGERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


async def knock(address: str, port: int, seconds: float) -> None:
    """Open a connection and close it. Raises OSError, or asyncio.TimeoutError after ``seconds``."""
    with socket.socket() as connection:
        connection.settimeout(0)
        await within(seconds, asyncio.get_running_loop().sock_connect(connection, (address, port)))


async def connect(host: Host, me: Identity, secret: bytes, *, timeout: float = HANDSHAKE_TIMEOUT) -> Channel:
    """Connect, as ``me``, to the first address of ``host`` at which its agent answers; each step may take ``timeout``
    seconds. Raises RunIsOver if an agent of a later run answers, else the OSError, ProtocolError or TimeoutError of the
    last address.
    """
    problem: Exception = ConnectionRefusedError("no address to dial")
    for address in host.addresses:
        connection = socket.socket()
        connection.settimeout(0)
        try:
            await within(timeout, asyncio.get_running_loop().sock_connect(connection, (address, host.port)))
            return await _introduce(connection, host.node, me, secret, timeout)
        except (OSError, asyncio.TimeoutError, messages.ProtocolError) as error:
            connection.close()
            problem = error
        except BaseException:
            connection.close()
            raise
    raise problem


async def _introduce(connection: socket.socket, node: int, me: Identity, secret: bytes, timeout: float) -> Channel:
    challenge = await within(timeout, _read_line(connection))
    handshake = Handshake(secret, challenge)
    introduction = messages.encode({"challenge": new_nonce(), "identity": vars(me)})
    await asyncio.get_running_loop().sock_sendall(connection, handshake.sign("dialer", introduction))
    answer = messages.decode(handshake.check("acceptor", await within(timeout, _read_line(connection))))
    peer = Identity.of(answer.get("identity"))
    me.check(peer)
    me.check_answer(peer, node)
    return await Channel.of(connection, peer, handshake.seal("dialer"), handshake.seal("acceptor"))


async def _read_line(connection: socket.socket) -> bytes:
    """The next line of the handshake; nothing may follow it before the answer. Raises ProtocolError."""
    line = b""
    while b"\n" not in line:
        if len(line) >= HANDSHAKE_LINE:
            raise messages.ProtocolError(f"expected a line of at most {HANDSHAKE_LINE} bytes")
        received = await asyncio.get_running_loop().sock_recv(connection, HANDSHAKE_LINE - len(line))
        if not received:
            raise ConnectionResetError("the connection was closed")
        line += received
    if not line.endswith(b"\n") or line.count(b"\n") > 1:
        raise messages.ProtocolError("expected one line")
    return line
