"""A connection for FFmpeg: it opens an address on loopback, and what it says there goes on to the
one that was looked at, over TLS where the scheme says so, with the login put in on the way.

FFmpeg has RTSP and RTMP only as something that opens an address by itself. So it never learns the
real one, no name is resolved by it, an answer that sends it elsewhere does not reach it, and no
password is ever in what it logs. RTSP is read message by message (rtsp.py); RTMP knows no
redirects in FFmpeg, and passes as it is.
"""

import secrets
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ..trust.addresses import Address
from .rtsp import Conversation
from .sources import Lost
from .wires import PATIENCE, connect, cut, worded

_CHUNK = 2**16
_FULL = 2**20  # bytes that wait for one side before no more is read from the other
_LOOK = 0.25  # seconds between two looks whether it goes on
STUCK = 2.0  # seconds in which the other end takes nothing of what waits for it


class _Speech(Protocol):
    """What passes, and as what."""

    def asked(self, data: bytes) -> bytes:
        """FFmpeg's bytes as they go to the server."""

    def answered(self, data: bytes) -> tuple[bytes, bytes]:
        """The server's bytes as they go to FFmpeg, and what is said to the server at once."""


class _AsItIs:
    def asked(self, data: bytes) -> bytes:
        return data

    def answered(self, data: bytes) -> tuple[bytes, bytes]:
        return data, b""


class Relay:
    """Connects at once; see wires.checked for the address.

    Args:
        address: of scheme rtsp, rtsps, rtmp or rtmps, with its secrets.
        what: the node's input, for messages.
        heard: called when something has come from the server.

    Attributes:
        url: what FFmpeg opens, once.
        options: what it needs to be told with it.
        trouble: what was wrong with the other end, in words, once it is lost.
        moved: seconds by time.monotonic at which the server last took all that it was sent.

    Raises:
        Lost, Refused.
    """

    def __init__(
        self, address: Address, what: str = "address", heard: Callable[[], None] = lambda: None
    ):
        self._address, self._heard = address, heard
        self.trouble: str | None = None
        self.moved = time.monotonic()
        self._wire = connect(address, what)
        self._door = socket.create_server(("127.0.0.1", 0), backlog=1)
        self._local: socket.socket | None = None
        self._waiting: dict[str, bytearray] = {"there": bytearray(), "here": bytearray()}
        self._over = threading.Event()
        here = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._speech: _Speech
        if address.scheme in ("rtsp", "rtsps"):
            # only who knows the way gets on, whoever else is on this machine
            self.url = f"rtsp://{here}/{secrets.token_hex(8)}"
            self._speech = Conversation(address, self.url)
            self.options = {"rtsp_transport": "tcp", "protocol_whitelist": "tcp"}
        else:
            self._speech = _AsItIs()
            app = "/".join(address.path.split("/")[1:-1][:2]) or address.path.strip("/")
            self.url = f"rtmp://{here}{address.target}"
            self.options = {
                "rtmp_tcurl": f"{address.origin}/{app}", "protocol_whitelist": "rtmp,tcp",
            }  # fmt: skip
        name = "livediffusion-source-relay"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """From any thread: who waits for it in FFmpeg is woken."""
        self._over.set()
        for one in (self._door, self._local, self._wire):
            if one is not None:
                cut(one)
        if self._thread is not threading.current_thread():
            self._thread.join(2 * _LOOK + 1)

    def _run(self) -> None:
        try:
            self._local = self._met()
            if self._local is not None:
                self._pass()
        except Lost as reason:
            self.trouble = str(reason)
        except OSError as error:
            if not self._over.is_set():
                self.trouble = f"{self._address.place} {worded(error)}"
        finally:
            self._over.set()
            for one in (self._door, self._local, self._wire):
                if one is not None:
                    cut(one)

    def _met(self) -> socket.socket | None:
        """FFmpeg's side, once it has come."""
        self._door.settimeout(_LOOK)
        deadline = time.monotonic() + PATIENCE
        while not self._over.is_set() and time.monotonic() < deadline:
            try:
                local, _ = self._door.accept()
            except TimeoutError:
                continue
            self._door.close()
            local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return local
        return None

    def _pass(self) -> None:
        """Pass on what comes from either side, until one of them is gone."""
        local, wire = self._local, self._wire
        here, there = self._waiting["here"], self._waiting["there"]
        for one in (local, wire):
            one.setblocking(False)
        gone = False  # the server is, and the rest of what it said is still to be passed on
        with selectors.DefaultSelector() as look:
            while not self._over.is_set() and not (gone and not here):
                reads = {local: len(there) < _FULL, wire: len(here) < _FULL and not gone}
                for one, rest in ((local, here), (wire, there)):
                    write = selectors.EVENT_WRITE if rest else 0
                    _watch(look, one, write | (selectors.EVENT_READ if reads[one] else 0))
                more = reads[wire] and _pending(wire)
                ready = {k.fileobj: e for k, e in look.select(0 if more else _LOOK)}
                may = {one: ready.get(one, 0) & selectors.EVENT_READ for one in (local, wire)}
                now = time.monotonic()
                if here:
                    _write(local, here)
                if not there or _write(wire, there):
                    self.moved = now
                elif now - self.moved > STUCK:
                    raise Lost(f"{self._address.place} takes no more data")
                if may[local]:
                    if (data := _read(local)) == b"":
                        return
                    there += self._speech.asked(data or b"")
                if may[wire] or more:
                    if (data := _read(wire)) == b"":
                        self.trouble = f"{self._address.place} has ended the stream"
                        gone = True
                    elif data:
                        self._heard()
                        back, forth = self._speech.answered(data)
                        here += back
                        there += forth


def _watch(look: selectors.BaseSelector, one: socket.socket, events: int) -> None:
    """A selector takes no empty interest."""
    known = look.get_map().get(one)
    if known is None:
        if events:
            look.register(one, events)
    elif not events:
        look.unregister(one)
    elif known.events != events:
        look.modify(one, events)


def _pending(one: socket.socket) -> bool:
    return isinstance(one, ssl.SSLSocket) and one.pending() > 0


def _read(one: socket.socket) -> bytes | None:
    """What is there: none at the end, None for nothing yet."""
    try:
        return one.recv(_CHUNK)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
        return None


def _write(one: socket.socket, waiting: bytearray) -> int:
    """Takes what is sent from what waits; returns how much that was."""
    try:
        sent = one.send(waiting[:_CHUNK])
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
        return 0
    del waiting[:sent]
    return sent
