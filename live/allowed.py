"""Which addresses and devices the person at the server has allowed: a file in the user folder."""

import logging
import os
import pathlib
import threading
from typing import Any, NamedTuple

from ..trust import addresses
from ..trust.boundary import ALLOWED, contents, told
from ..trust.schema import BadData, Limits
from ..trust.whole import write
from .faults import Refused, Unread

ADDRESS, DEVICE = "address", "device"
FOLDER, FILE = "livediffusion", "allowed.json"  # in ComfyUI's user folder
LIMITS = Limits(bytes=2**20, depth=4, items=4 * addresses.MOST_PATTERNS)
_log = logging.getLogger(__name__)


class NotAllowed(Refused):
    """What nobody at the server has allowed yet.

    Attributes:
        allow: what its page may ask to allow: `kind` and `what`, without secrets.
    """

    def __init__(self, message: str, kind: str, what: str):
        super().__init__(message)
        self.allow = {"kind": kind, "what": what}


class _Rules(NamedTuple):
    patterns: tuple[addresses.Pattern, ...] = ()
    devices: frozenset[str] = frozenset()


class Allowed:
    """Args:
    folder: where the file is or will be. Any thread may ask.

    Attributes:
        path, named: the file, and what it is called in that folder.
    """

    def __init__(self, folder: pathlib.Path):
        self.path, self.named = folder / FOLDER / FILE, f"{FOLDER}/{FILE}"
        self._lock = threading.Lock()
        self._seen: Any = None
        self._rules = _Rules()

    def address(
        self, address: addresses.Address, what: str = ADDRESS,
        shown: addresses.Address | None = None,
    ) -> None:  # fmt: skip
        """Raises NotAllowed.

        Args:
            what: the node's input, for the message.
            shown: the address without secrets.
        """
        if not addresses.allowed(address, self._read().patterns):
            shown = shown or address
            raise NotAllowed(
                f"{what}: {shown.text(login=False)} {self._how()}", ADDRESS, shown.text()
            )

    def device(self, name: str) -> None:
        """Raises NotAllowed."""
        devices = self._read().devices
        if name not in devices and "*" not in devices:
            raise NotAllowed(f"device: {name} {self._how()}", DEVICE, name)

    def add(self, kind: str, what: str) -> None:
        """Allow a pattern, or a device by its name. Raises Refused, OSError."""
        with self._lock:
            data = self._data()
            key = "addresses" if kind == ADDRESS else "devices"
            names = data[key] = list(data.get(key, ()))
            if what in names:
                return
            if len(names) >= addresses.MOST_PATTERNS:
                raise Refused(f"{kind}: {self.path.name} has {len(names)} already. Remove some.")
            names.append(what)
            write(self.path, data, by_hand=True)
            self._seen = None

    def _how(self) -> str:
        return (
            "is not allowed yet. Press Allow on the node at the server's own page (localhost), or "
            f"add it to {FOLDER}/{FILE} in ComfyUI's user folder."
        )

    def _data(self) -> dict[str, Any]:
        try:
            return told(contents(self.path, LIMITS.bytes), FILE, LIMITS, ALLOWED)
        except FileNotFoundError:
            return {}
        except (OSError, BadData) as reason:
            raise Unread(f"{FOLDER}/{FILE} cannot be read: {reason}") from None

    def _read(self) -> _Rules:
        with self._lock:
            try:
                found = os.stat(self.path)
                seen = found.st_mtime_ns, found.st_size, found.st_ino
            except OSError:
                seen = None
            if seen is None:
                self._rules = _Rules()
            elif seen != self._seen:
                data = self._data()
                self._rules = _Rules(_patterns(data), frozenset(data.get("devices", ())))
            self._seen = seen
            return self._rules


def _patterns(data: dict[str, Any]) -> tuple[addresses.Pattern, ...]:
    found = []
    for i, text in enumerate(data.get("addresses", ())):
        try:
            found.append(addresses.pattern(text, f"{FOLDER}/{FILE}: address {i + 1}"))
        except BadData as reason:
            # one line that was written wrongly takes nothing from the others
            _log.warning("LiveDiffusion: %s", reason)
    return tuple(found)
