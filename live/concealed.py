"""Secrets in addresses: kept here, and nowhere else; what everybody else sees has names for them.

`rtsp://user:word@10.0.0.5/` becomes `rtsp://{k3f9a2b1}@10.0.0.5/` before a graph or a workflow is
queued, and only who connects asks for the first again. A name stands for its secret at the place
that it was typed for and nowhere else: it cannot be sent to another host.
"""

import errno
import pathlib
import re
import secrets
import threading
from collections import OrderedDict
from typing import Any
from urllib.parse import unquote

from ..trust import addresses
from ..trust.addresses import SCHEMES, Address
from ..trust.boundary import SECRETS, contents, told
from ..trust.schema import BadData, Limits
from ..trust.whole import write
from .allowed import FOLDER
from .bounds import most
from .faults import Refused, Unread

FILE = "secrets.json"
UNREAD = "{unread}"  # stands for nothing: what may be secret in a text that is no address
_LIMITS = Limits(bytes=2**20, depth=4, items=8000)
_NAME = re.compile(r"\{([a-z0-9]{1,32})\}")
# values of a query that say how, not who
_PLAIN = re.compile(r"[0-9]{1,5}|true|false|caller|live|tcp|main|sub")
# names of values that are always secret, whatever they are
_CALLED = (
    r"[\w.-]*(?:pass|pwd|psw|token|key|secret|auth|sig|user|usr|login|cred|account|session|jwt"
    r"|streamid|hash)[\w.-]*|u|p|id|sid|pw|pin|code|name"
)
_SECRET = re.compile(_CALLED, re.IGNORECASE)
# as cameras have them in a path: user=admin&password=word&channel=1, user=admin_password=word_...
_PAIR = re.compile(r"[A-Za-z][A-Za-z0-9.-]*=(?:(?![&;,/]|_[A-Za-z][A-Za-z0-9.-]*=).)+")
# parts of a WHIP endpoint's path that are no key
_WORDS = re.compile(
    r"|whip|whep|webrtc|rtc|live|app|api|v[0-9]|ingest|publish|stream|endpoint", re.IGNORECASE
)
_SCHEME = re.compile(rf"(?:{'|'.join(SCHEMES)})(?::/*|/+)", re.IGNORECASE)
# signs of a text that is no address, but may have a secret
_TELLING = re.compile(r"[@=?#\uff20]|%(?:25)*(?:40|3d|3f|23)|:(?![0-9]*(?:[/?#]|$))", re.IGNORECASE)
# texts of other inputs that are meant as an address, or a part of one
_MEANT = re.compile(
    rf"\s*(?:[a-z]{{3,5}}:/|[^\s@]*:[^@]*@|(?:{_CALLED})=\S)|.*[?&/](?:{_CALLED})=\S",
    re.IGNORECASE | re.DOTALL,
)
_SURE = 8  # letters of such a text that is looked for inside of others, too


class Concealed:
    """Args:
    folder: ComfyUI's user folder; those that are kept are in it. Any thread may ask.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder / FOLDER / FILE
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[str, str]] = OrderedDict()  # name: secret, origin
        self._kept: dict[str, tuple[str, str]] | None = None
        self._unread = ""  # why the file cannot be read, while it is there and cannot

    def read(self, text: str, sink: bool = False, what: str = "address") -> Address:
        """An address with names in place of its secrets; the same one gets the same names.

        This is the only reading of what a node has: what it takes is what it conceals.

        Args:
            sink: pictures go there: the last part of the path is a stream's key, and of a WHIP
                endpoint's each that is no usual word.
            what: the node's input, for the message.

        Raises:
            BadData: it is no address; the message does not show it.
        """
        text = text.strip()
        if UNREAD in text:
            raise BadData(addresses.unreadable(what))
        address = addresses.parsed(text, what)
        login = self._name(address.login, address) if address.login else ""
        query = "&".join(self._value(one, address) for one in address.query.split("&"))
        return address._replace(login=login, query=query, path=self._path(address, sink))

    def conceal(self, text: str, sink: bool = False) -> str:
        """What is in an address input without its secrets, be it an address (see `read`) or not.

        Where it is none, and may have secrets, UNREAD stands for all of it behind its scheme: it
        is refused afterwards anyway, but shown before.
        """
        try:
            address = self.read(text, sink)
        except BadData:
            bare = text.strip()
            head = found[0] if (found := _SCHEME.match(bare)) else ""
            rest = bare[len(head) :]
            if rest and (_TELLING.search(rest) or (sink and "/" in rest)):
                return head + UNREAD
            return text
        if "#" not in text and address == addresses.parsed(text.strip()):
            return text
        return address.text()

    def saved(self, text: str) -> bool:
        """Whether all names in a text, of which there are some, are known tomorrow, too."""
        names = _NAME.findall(text)
        with self._lock:
            return bool(names) and all(name in self._file() for name in names)

    def reveal(self, address: Address, what: str = "address") -> Address:
        """The address that a connection is made to. Raises Refused for a name of no secret."""

        def secret(found: re.Match) -> str:
            with self._lock:
                value, unread = self._of(found, address), self._unread
            if value is None and unread:
                raise Unread(f"{what}: {found[0]} stands for a secret; {unread}")
            if value is None:
                raise Refused(
                    f"{what}: {found[0]} stands for a secret that is not known for "
                    f"{address.place}. Type it anew."
                )
            return value

        return address._replace(**{
            part: _NAME.sub(secret, getattr(address, part)) for part in ("login", "path", "query")
        })  # fmt: skip

    def keep(self, address: Address) -> None:
        """Have what the names in an address stand for known tomorrow, too.

        Raises:
            OSError: the file cannot be written, or cannot be read: what it has is not lost for
                one more. `strerror` has the words, `filename` the file.
        """
        names = set(_NAME.findall(address.text()))
        with self._lock:
            kept = dict(self._file())
            kept.update((n, self._known[n]) for n in names if n in self._known)
            if kept == (self._kept or {}):
                return
            if self._kept is None:
                raise OSError(errno.EIO, self._unread, str(self.path))
            for name in list(kept)[: -most("concealed.Concealed._kept")]:
                del kept[name]
            data = {n: {"secret": s, "for": origin} for n, (s, origin) in kept.items()}
            write(self.path, data)
            self._kept = kept

    def _value(self, pair: str, address: Address) -> str:
        name, equals, value = pair.partition("=")
        if not equals:
            name, value = "", name
        called = _SECRET.fullmatch(unquote(name))
        if not value or (_PLAIN.fullmatch(value) and not called):
            return pair
        return name + equals + self._name(value, address)

    def _path(self, address: Address, sink: bool) -> str:
        parts = address.path.split("/")
        last = max((i for i, part in enumerate(parts) if part), default=None)
        for i, part in enumerate(parts):
            if sink and address.scheme in ("http", "https"):
                whole = not _WORDS.fullmatch(part)
            else:
                whole = sink and i == last
            # where = is written %3D the pairs are not told apart
            if whole or ("=" not in part and "=" in unquote(part)):
                parts[i] = self._name(part, address)
            else:
                parts[i] = _PAIR.sub(lambda pair: self._value(pair[0], address), part)
        return "/".join(parts)

    def _name(self, secret: str, address: Address) -> str:
        if (known := _NAME.fullmatch(secret)) is not None:
            with self._lock:
                self._find(known[1])  # it is used
            return secret
        with self._lock:
            # what was concealed in it before, a name stands for now together with the rest
            secret = _NAME.sub(lambda name: self._of(name, address) or name[0], secret)
        with self._lock:
            sought = secret, address.origin
            for known in (self._known, self._file()):
                for name, value in known.items():
                    if value == sought:
                        return f"{{{name}}}"
            name = f"k{secrets.token_hex(6)}"
            self._known[name] = sought
            while len(self._known) > most("concealed.Concealed._known"):
                self._known.popitem(last=False)
        return f"{{{name}}}"

    def _of(self, name: re.Match, address: Address) -> str | None:
        value, origin = self._find(name[1]) or ("", "")
        return value if origin == address.origin else None

    def _find(self, name: str) -> tuple[str, str] | None:
        if name in self._known:
            self._known.move_to_end(name)
            return self._known[name]
        return self._file().get(name)

    def _file(self) -> dict[str, tuple[str, str]]:
        """What is kept; nothing, until it can be read, while `_unread` says why."""
        if self._kept is None:
            self._unread = ""
            try:
                data = told(contents(self.path, _LIMITS.bytes), FILE, _LIMITS, SECRETS)
            except FileNotFoundError:
                data = {}
            except (OSError, BadData) as reason:
                # perhaps for a moment only (too many open files), or a comma of somebody's
                # what BadData says may have a part of it
                why = getattr(reason, "strerror", None) or "it is damaged"
                self._unread = f"{FOLDER}/{FILE} cannot be read ({why}). Mend it, or move it away."
                return {}
            self._kept = {name: (one["secret"], one["for"]) for name, one in data.items()}
        return self._kept


def concealed(data: dict[str, Any], store: Concealed, ends: dict[str, bool]) -> dict[str, Any]:
    """A posted prompt without secrets, changed in place: its graph and what came with it.

    Args:
        data: as ComfyUI's prompt handlers get it: prompt, extra_data.
        ends: node classes that have an address, and whether it is a sink's.
    """
    graph, extra = data.get("prompt"), data.get("extra_data")
    found: dict[str, str] = {}  # addresses
    blurred: dict[str, str] = {}  # what is none

    def look(value: Any, sink: bool) -> Any:
        if not isinstance(value, str) or (other := store.conceal(value, sink)) == value:
            return value
        (blurred if UNREAD in other else found).update({value: other, value.strip(): other})
        return other

    nodes = graph.values() if isinstance(graph, dict) else ()
    for node in [node for node in nodes if _is_end(node, "class_type", ends)]:
        inputs, sink = node.get("inputs"), ends[node["class_type"]]
        if not isinstance(inputs, dict) or "address" not in inputs:
            continue
        inputs["address"] = look(inputs["address"], sink)
        for other in _linked(graph, inputs["address"]):
            for name, value in other.items():
                if _meant(value):
                    other[name] = look(value, sink)
    for one in _inside(extra):
        if _is_end(one, "type", ends):
            for value in _inside(one.get("widgets_values")):
                if _meant(value):
                    look(value, ends[one["type"]])
    if found:
        longest = sorted(found, key=len, reverse=True)
        _exchange([graph, extra], lambda text: _exchanged(text, longest, found))
    if blurred:
        # not in the graph: there it may be another node's, and mean something
        longest = sorted((text for text in blurred if len(text) >= _SURE), key=len, reverse=True)
        _exchange([extra], lambda text: blurred.get(text) or _exchanged(text, longest, blurred))
    return data


def texts(graph: Any) -> dict[str, dict[str, str]]:
    """The texts in a graph: by node, by input."""
    return {
        id: {name: text for name, text in node["inputs"].items() if isinstance(text, str)}
        for id, node in (graph.items() if isinstance(graph, dict) else ())
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }


def changed(
    before: dict[str, dict[str, str]], graph: dict[str, Any], store: Concealed
) -> dict[str, dict[str, str]]:
    """What a page is to put into its nodes, so that no workflow is saved with a secret.

    Args:
        before: `texts` of the graph that came.
        graph: the same after `concealed`.

    Returns:
        Texts by node, by input: those that are concealed now and known tomorrow, too.
    """
    told = {}
    for id, inputs in texts(graph).items():
        came = before.get(id, {})
        others = {n: t for n, t in inputs.items() if t != came.get(n, t) and store.saved(t)}
        if others:
            told[id] = others
    return told


def _meant(value: Any) -> bool:
    return isinstance(value, str) and _MEANT.match(value[: 2 * addresses.MOST]) is not None


def _is_end(node: Any, key: str, ends: dict[str, bool]) -> bool:
    return isinstance(node, dict) and isinstance(node.get(key), str) and node[key] in ends


def _linked(graph: dict[str, Any], link: Any) -> list[dict[str, Any]]:
    """The inputs of all nodes that a link comes from."""
    found: dict[str, dict[str, Any]] = {}
    todo = [link]
    while todo:
        one = todo.pop()
        if isinstance(one, list) and one and isinstance(one[0], str) and one[0] not in found:
            node = graph.get(one[0])
            inputs = node.get("inputs") if isinstance(node, dict) else None
            if isinstance(inputs, dict):
                found[one[0]] = inputs
                todo += inputs.values()
    return list(found.values())


def _exchanged(text: str, longest: list[str], found: dict[str, str]) -> str:
    for plain in longest:
        if plain in text:
            text = text.replace(plain, found[plain])
    return text


def _inside(value: Any):
    """A value and all that is in it."""
    todo = [value]
    while todo:
        one = todo.pop()
        yield one
        if isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def _exchange(value: Any, other) -> None:
    """Change every text in lists and tables."""
    for one in list(_inside(value)):
        if isinstance(one, dict | list):
            for key, text in one.items() if isinstance(one, dict) else enumerate(one):
                if isinstance(text, str):
                    one[key] = other(text)
