"""Secrets in addresses: kept here, and nowhere else; what everybody else sees has names for them.

`rtsp://user:word@10.0.0.5/` becomes `rtsp://{k3f9a2b1}@10.0.0.5/` before a graph or a workflow is
queued, and only who connects asks for the first again. A name stands for its secret at the place
that it was typed for and nowhere else: it cannot be sent to another host.
"""

import pathlib
import re
import secrets
import threading
from collections import OrderedDict
from typing import Any

from ..trust import addresses
from ..trust.addresses import Address
from ..trust.boundary import SECRETS, contents, told
from ..trust.schema import BadData, Limits
from ..trust.whole import write
from .allowed import FOLDER
from .bounds import most
from .faults import Refused

FILE = "secrets.json"
_LIMITS = Limits(bytes=2**20, depth=4, items=8000)
_NAME = re.compile(r"\{([a-z0-9]{1,32})\}")
_MEANT = re.compile(r"[a-z]{3,5}://", re.IGNORECASE)
_LONG = 16  # letters of a part of a path that is no word
# values of a query that say how, not who
_PLAIN = re.compile(r"[0-9]{1,5}|true|false|caller|live|tcp|main|sub")


class Concealed:
    """Args:
    folder: ComfyUI's user folder; those that are kept are in it. Any thread may ask.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder / FOLDER / FILE
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[str, str]] = OrderedDict()  # name: secret, origin
        self._kept: dict[str, tuple[str, str]] | None = None

    def conceal(self, text: str, sink: bool = False) -> str:
        """An address without its secrets; the same one gets the same names.

        Args:
            sink: the last part of an RTMP address is a stream's key, as long parts of a WHIP
                endpoint's are.
        """
        if not _MEANT.match(text):
            return text
        try:
            address = addresses.parsed(text)
        except BadData:
            # it is refused later, and shown before
            text = re.sub(r"(://)[\s\S]*@", r"\1{unread}@", text)
            return re.sub(r"=[^&]+", "={unread}", text)
        login = self._name(address.login, address) if address.login else ""
        query = "&".join(self._value(one, address) for one in address.query.split("&"))
        path = address.path
        if sink and address.scheme in ("rtmp", "rtmps"):
            head, slash, key = path.rpartition("/")
            path = head + slash + self._name(key, address) if key else path
        elif sink and address.scheme in ("http", "https"):
            parts = (self._name(p, address) if len(p) >= _LONG else p for p in path.split("/"))
            path = "/".join(parts)
        return address._replace(login=login, query=query, path=path).text()

    def reveal(self, address: Address, what: str = "address") -> Address:
        """The address that a connection is made to. Raises Refused for a name of no secret."""

        def secret(found: re.Match) -> str:
            with self._lock:
                value, origin = self._find(found[1]) or ("", "")
            if origin != address.origin:
                raise Refused(
                    f"{what}: {found[0]} stands for a secret that is not known for "
                    f"{address.place}. Type it anew."
                )
            return value

        return address._replace(**{
            part: _NAME.sub(secret, getattr(address, part)) for part in ("login", "path", "query")
        })  # fmt: skip

    def keep(self, address: Address) -> None:
        """Have what the names in an address stand for known tomorrow, too. Raises OSError."""
        names = set(_NAME.findall(address.text()))
        with self._lock:
            kept = dict(self._file())
            kept.update((n, self._known[n]) for n in names if n in self._known)
            if kept == self._kept:
                return
            for name in list(kept)[: -most("concealed.Concealed._kept")]:
                del kept[name]
            data = {n: {"secret": s, "for": origin} for n, (s, origin) in kept.items()}
            write(self.path, data)
            self._kept = kept

    def _value(self, pair: str, address: Address) -> str:
        name, equals, value = pair.partition("=")
        if not equals:
            name, value = "", name
        if not value or _PLAIN.fullmatch(value):
            return pair
        return name + equals + self._name(value, address)

    def _name(self, secret: str, address: Address) -> str:
        if (known := _NAME.fullmatch(secret)) is not None:
            with self._lock:
                self._find(known[1])  # it is used
            return secret
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

    def _find(self, name: str) -> tuple[str, str] | None:
        if name in self._known:
            self._known.move_to_end(name)
            return self._known[name]
        return self._file().get(name)

    def _file(self) -> dict[str, tuple[str, str]]:
        if self._kept is None:
            try:
                data = told(contents(self.path, _LIMITS.bytes), FILE, _LIMITS, SECRETS)
            except (OSError, BadData):
                data = {}  # what was kept is lost: it is typed anew
            self._kept = {name: (one["secret"], one["for"]) for name, one in data.items()}
        return self._kept


def concealed(data: dict[str, Any], store: Concealed, ends: dict[str, bool]) -> dict[str, Any]:
    """A posted prompt without secrets, changed in place: its graph and what came with it.

    Args:
        data: as ComfyUI's prompt handlers get it: prompt, extra_data.
        ends: node classes that have an address, and whether it is a sink's.
    """
    graph, extra = data.get("prompt"), data.get("extra_data")
    found: dict[str, str] = {}

    def look(value: Any, sink: bool) -> None:
        if isinstance(value, str) and (other := store.conceal(value, sink)) != value:
            found[value] = other

    for node in graph.values() if isinstance(graph, dict) else ():
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict):
            kind = node.get("class_type")
            if isinstance(kind, str) and kind in ends:
                sink = ends[kind]
                for value in _typed(graph, node["inputs"].get("address")):
                    look(value, sink)
    for one in _inside(extra):
        if isinstance(one, dict) and isinstance(one.get("type"), str) and one["type"] in ends:
            for value in _inside(one.get("widgets_values")):
                look(value, ends[one["type"]])
    if found:
        longest = sorted(found, key=len, reverse=True)
        _exchange([graph, extra], lambda text: _exchanged(text, longest, found))
    return data


def _typed(graph: dict[str, Any], value: Any) -> list[Any]:
    """What was typed for an input: itself, or the texts of the node that it is linked to."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        node = graph.get(value[0])
        inputs = node.get("inputs") if isinstance(node, dict) else None
        return list(inputs.values()) if isinstance(inputs, dict) else []
    return [value]


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
