"""Connections to what an address names: looked up once, looked at, and made to that very place.

Nothing else in the pack connects to a host that a workflow names. FFmpeg never resolves a name and
never opens anything by itself: it gets bytes of a connection that was made here, or the address of
a Relay on loopback (relay.py).
"""

import contextlib
import functools
import http.client
import io
import math
import pathlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urljoin

import folder_paths

from ..trust import addresses
from ..trust.addresses import SECURE, Address
from ..trust.schema import BadData
from .allowed import Allowed
from .concealed import Concealed
from .faults import Refused
from .heads import head
from .logins import Login
from .sources import Lost

PATIENCE = 1.8  # seconds in which a connection is there, or is lost
SILENCE = 2.0  # seconds without a byte after which a stream is over
_ANSWER = 5.0  # seconds in which the head of an answer is there, or a body that is wanted whole
_LOOKUPS = 8  # names that are looked up at a time; a resolver that is gone answers none of them
_ASKS, _BETWEEN = 4, 1.0  # questions for a name at a time, and seconds between two of them
_MOST_HOPS = 4
_AGENT = "ComfyUI-LiveDiffusion"


@functools.lru_cache(maxsize=4)
def _kept(folder: str) -> tuple[Allowed, Concealed]:
    return Allowed(pathlib.Path(folder)), Concealed(pathlib.Path(folder))


def allowed() -> Allowed:
    """What the person at this server allows."""
    return _kept(folder_paths.get_user_directory())[0]


def concealed() -> Concealed:
    """The secrets in addresses that this server knows."""
    return _kept(folder_paths.get_user_directory())[1]


def checked(
    text: str, schemes: tuple[str, ...], what: str = "address", sink: bool = False
) -> Address:
    """An address that may be connected to, looked at without reaching for it.

    Args:
        text: as the node has it, with secrets or with their names.
        schemes: those that its user can use.
        what: the node's input, for the message.
        sink: pictures go there; see Concealed.read.

    Returns:
        The Address with its secrets; for connections only, never for a message.

    Raises:
        Refused: it is none, it is not allowed (NotAllowed), or its secrets are not known, or none
            of its place.
    """
    try:
        shown = concealed().read(text, sink, what)
        if shown.scheme not in schemes:
            one_of = ", ".join(f"{name}://" for name in schemes)
            raise Refused(f"{what}: {shown.scheme}:// cannot be used here. Give {one_of}.")
        if shown.ip is not None:
            addresses.reachable(shown, [shown.host], what)
    except BadData as reason:
        raise Refused(str(reason)) from None
    real = concealed().reveal(shown, what)
    try:
        # names in other places, or in pieces of them, could make what would not have been read
        fits = addresses.parsed(real.text(), what) == real
    except BadData:
        fits = False
    if not fits:
        raise Refused(f"{what}: what {{...}} stands for is of another part of it. Type it anew.")
    allowed().address(real, what, shown)
    with contextlib.suppress(OSError):
        # a saved workflow has the names alone, and is to go on tomorrow
        concealed().keep(shown)
    return real


# -- names -----------------------------------------------------------------------------------

_pending: dict[str, "_Lookup"] = {}
_lock = threading.Lock()


class _Lookup:
    """One name on its way; a resolver cannot be told to stop, so nobody waits for its end.

    A question that was lost with the network the system asks again only after 5 s: who wants the
    name meanwhile asks beside it, and the first answer counts.
    """

    def __init__(self, host: str):
        self.host, self.done = host, threading.Event()
        self.ips: list[str] = []
        self._asks, self._asked = 0, -math.inf

    def ask(self) -> None:
        """Under _lock."""
        now = time.monotonic()
        if self._asks < _ASKS and now - self._asked >= _BETWEEN:
            try:
                threading.Thread(target=self._run, name="livediffusion-name", daemon=True).start()
            except RuntimeError:  # no thread can be made now
                if not self._asks:
                    del _pending[self.host]
                raise Lost(f"{self.host} is not looked up: the computer is too busy") from None
            self._asks, self._asked = self._asks + 1, now

    def _run(self) -> None:
        ips: list[str] = []
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
            ips = list(dict.fromkeys(str(one[4][0]) for one in found))
        except (OSError, UnicodeError):
            pass
        finally:
            with _lock:
                self._asks -= 1
                if _pending.get(self.host) is self:
                    del _pending[self.host]
                    self.ips = ips
                    self.done.set()


def look_up(address: Address, what: str = "address", patience: float = PATIENCE) -> list[str]:
    """The IP addresses that a name stands for now, each of which may be reached.

    Raises:
        Lost: there are none, or not in time.
        Refused: one of them may not be reached.
    """
    if address.ip is not None:
        ips = [address.host]
    else:
        with _lock:
            one = _pending.get(address.host)
            if one is None:
                if len(_pending) >= _LOOKUPS:
                    raise Lost(f"{address.host} is not looked up: no name server answers")
                one = _pending[address.host] = _Lookup(address.host)
            one.ask()
        if not one.done.wait(patience):
            raise Lost(f"the name {address.host} is not found: no name server answers")
        ips = one.ips
        if not ips:
            raise Lost(f"the name {address.host} is not found")
    try:
        return [str(ip) for ip in addresses.reachable(address, ips, what)]
    except BadData as reason:
        raise Refused(str(reason)) from None


# -- connections -----------------------------------------------------------------------------


def connect(address: Address, what: str = "address", patience: float = PATIENCE) -> socket.socket:
    """A connection by TCP, by TLS where the scheme says so; see `checked` for the address.

    The caller closes it. Its timeout is `patience`.

    Raises:
        Lost, Refused.
    """
    deadline = time.monotonic() + patience
    ips = look_up(address, what, patience)
    reason: Exception = Lost(f"{address.place} does not answer")
    for i, ip in enumerate(ips):
        left = (deadline - time.monotonic()) / (len(ips) - i)
        if left <= 0:
            break
        try:
            wire = socket.create_connection((ip, address.port), max(0.05, left))
        except OSError as error:
            reason = Lost(f"{address.place} {worded(error)}")
            continue
        try:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.settimeout(max(0.2, deadline - time.monotonic()))
            if address.scheme in SECURE:
                wire = _context().wrap_socket(wire, server_hostname=address.host)
            wire.settimeout(patience)
            return wire
        except ssl.SSLCertVerificationError as error:
            wire.close()
            raise Lost(
                f"{address.place} has a certificate that is not trusted here "
                f"({error.verify_message}). Add its authority to this system, or name it in "
                "SSL_CERT_FILE."
            ) from None
        except OSError as error:
            wire.close()
            reason = Lost(f"{address.place} {worded(error)}")
    raise reason


@functools.lru_cache(maxsize=1)
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


def worded(error: OSError) -> str:
    """What went wrong with a connection, after the name of the other end."""
    if isinstance(error, TimeoutError):
        return "does not answer"
    if isinstance(error, ConnectionRefusedError):
        return "does not take the connection; nothing listens there"
    if isinstance(error, ConnectionError):
        return "has cut the connection"
    if isinstance(error, ssl.SSLError):
        return "does not speak TLS as it should"
    return f"cannot be reached ({(error.strerror or 'no route').lower()})"


# -- HTTP ------------------------------------------------------------------------------------


class Call:
    """What a server is asked, one question after the other, cut off from any thread.

    Args:
        came: called when something has come: a connection is there, or an answer.
    """

    def __init__(self, came: Callable[[], None] = lambda: None):
        self.came = came
        self._lock, self._over = threading.Lock(), False
        self._wire: socket.socket | None = None

    def holds(self, wire: socket.socket) -> None:
        """Have this one cut instead of the one before it. Raises Lost: it is closed."""
        with self._lock:
            self._wire, over = wire, self._over
        if over:
            raise Lost("it is closed")
        self.came()

    def close(self) -> None:
        """Whoever waits for it is woken."""
        with self._lock:
            self._over, wire = True, self._wire
        if wire is not None:
            cut(wire)


class _Heard(io.RawIOBase):
    """What comes over a wire.

    Attributes:
        pause: seconds without a byte after which it is over.
        until: seconds by time.monotonic at which it is, if at all: who sends a byte now and then
            never pauses.
    """

    def __init__(self, wire: socket.socket):
        self._wire, self._raw = wire, wire.makefile("rb", buffering=0)
        self.pause, self.until = PATIENCE, time.monotonic() + _ANSWER

    def makefile(self, mode: str) -> io.BufferedReader:
        """For http.client."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._wire.settimeout(min(self.pause, left))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Answer:
    """An answer of a server, its body still on the way. Closed by whoever asked.

    Attributes:
        status: of HTTP.
        headers: without case.
        address: whom it came from, after redirects; with its secrets.
        peer: the IP address of that.
    """

    def __init__(
        self,
        address: Address,
        wire: socket.socket,
        heard: _Heard,
        response: http.client.HTTPResponse,
    ):
        self.address, self._wire, self._heard, self._response = address, wire, heard, response
        self.status, self.headers = response.status, response.headers
        self.peer: str = wire.getpeername()[0]

    def read(self, most: int) -> bytes:
        """Up to so many bytes, as soon as there are some; none at the end. Raises Lost."""
        try:
            data = self._response.read1(most)
            if not data and self._response.length:
                raise ConnectionError  # more was promised
            return data
        except (OSError, ValueError, AttributeError, http.client.HTTPException) as error:
            said = worded(error) if isinstance(error, OSError) else "has cut the connection"
            raise Lost(f"{self.address.place} {said}") from None

    def whole(self, most: int) -> bytes:
        """All of the body. Raises Lost, also for one of more than so many bytes."""
        data = bytearray()
        self._heard.until = time.monotonic() + _ANSWER
        while part := self.read(2**16):
            data += part
            if len(data) > most:
                raise Lost(f"{self.address.place} sends more than {most} bytes at once")
        return bytes(data)

    def close(self) -> None:
        """From any thread: who reads is woken."""
        cut(self._wire)
        self._response.close()


def cut(wire: socket.socket) -> None:
    """Close a socket, also while another thread waits for it."""
    with contextlib.suppress(OSError, ValueError):
        # not TLS's own: that would wait for the other end's farewell
        socket.socket.shutdown(wire, socket.SHUT_RDWR)
    wire.close()


def ask(
    address: Address,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | None = None,
    what: str = "address",
    login: Login | None = None,
    call: Call | None = None,
) -> Answer:
    """Ask a server by HTTP/1.1, and where it says that another is to be asked, that one.

    Each of them is looked at anew and needs to be allowed. A login goes to the first origin only.

    Args:
        address: see `checked`.
        call: what cuts it off, also the answer.

    Raises:
        Lost, Refused.
    """
    first, login, call = address, login or Login(address), call or Call()
    for _ in range(_MOST_HOPS):
        mine = address.origin == first.origin
        answer = _asked(address, method, headers, body, what, login if mine else None, call)
        challenges = answer.headers.get_all("WWW-Authenticate") or []
        if answer.status == 401 and mine and login.hear(challenges):
            answer.close()
            answer = _asked(address, method, headers, body, what, login, call)
        if answer.status not in (301, 302, 303, 307, 308) or "Location" not in answer.headers:
            return answer
        answer.close()
        address = elsewhere(address, answer.headers["Location"], what)
        if answer.status in (301, 302, 303) and method != "GET":
            method, body = "GET", None
    raise Lost(f"{first.place} leads from one address to the next")


def elsewhere(address: Address, location: str, what: str = "address") -> Address:
    """The address that a server leads to, looked at as one that was typed.

    At the server itself it needs no pattern of its own: what is there the server decides anyway.

    Raises:
        Refused: it is none that may be opened.
    """
    try:
        try:
            text = urljoin(address.text(login=False), location)
        except ValueError:  # as for [ without ]
            raise BadData(f"{what}: {address.place} leads to what is no address.") from None
        found = addresses.parsed(text, what)
        if found.scheme not in ("http", "https") or (address.scheme, found.scheme) == (
            "https", "http"
        ):  # fmt: skip
            raise BadData(f"{what}: {address.place} leads to {found.scheme}://, which is not safe.")
        if found.ip is not None:
            addresses.reachable(found, [found.host], what)
    except BadData as reason:
        raise Refused(str(reason)) from None
    if found.origin == address.origin:
        return found._replace(login=address.login)
    shown = found._replace(login="", query="")
    allowed().address(found._replace(login=""), what, shown)
    return found._replace(login="")


def _asked(
    address: Address,
    method: str,
    headers: Mapping[str, str] | None,
    body: bytes | None,
    what: str,
    login: Login | None,
    call: Call,
) -> Answer:
    wire, response = connect(address, what), None
    try:
        call.holds(wire)
        usual = address.port == addresses.SCHEMES[address.scheme]
        host = address.place.rpartition(":")[0] if usual else address.place
        said = {"Host": host, "User-Agent": _AGENT, "Accept": "*/*", "Connection": "close"}
        said |= {"Content-Length": str(len(body))} if body is not None else {}
        proof = login.answer(method, address.target) if login is not None else None
        said |= {"Authorization": proof} if proof else {}
        lines = [f"{method} {address.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in (said | dict(headers or {})).items()]
        wire.sendall(head(lines) + (body or b""))
        heard = _Heard(wire)
        response = http.client.HTTPResponse(heard, method=method)
        response.begin()
        call.came()
        heard.pause, heard.until = SILENCE, math.inf
        return Answer(address, wire, heard, response)
    except BaseException as error:
        cut(wire)
        if response is not None:
            response.close()  # it has the socket, too
        if not isinstance(error, OSError | ValueError | http.client.HTTPException):
            raise
        said = worded(error) if isinstance(error, OSError) else "does not speak HTTP"
        raise Lost(f"{address.place} {said}") from None
