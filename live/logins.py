"""The answers to a server that asks who is there: Basic (RFC 7617) and Digest (RFC 7616).

HTTP and RTSP (RFC 2326, section 3) ask in the same way.
"""

import base64
import hashlib
import re
import secrets
from urllib.parse import unquote

from ..trust.addresses import Address

_FIELD = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))')
_START = re.compile(r"(?:^|,)\s*(Basic|Digest|Bearer)(?=\s|$|,)", re.IGNORECASE)
_HASHES = {"MD5": hashlib.md5, "SHA-256": hashlib.sha256, "SHA-512-256": None}


class Login:
    """Who an address says is there, for one connection. Not for several threads.

    Args:
        address: with its login as it is, not concealed.
    """

    def __init__(self, address: Address):
        user, colon, word = address.login.partition(":")
        self.given = bool(address.login)
        self._user, self._word, self._token = unquote(user), unquote(word), bool(colon and not user)
        self._asked: dict[str, str] | None = None
        self._kind, self._count = "", 0

    def hear(self, challenges: list[str]) -> bool:
        """Take a server's WWW-Authenticate; returns whether there is a new answer to give."""
        offered = [one for text in challenges for one in _challenges(text)]
        best = None
        for kind, fields in offered:
            algorithm = fields.get("algorithm", "MD5").upper().removesuffix("-SESS")
            if kind == "digest" and _HASHES.get(algorithm) and "nonce" in fields:
                if best is None or best[0] != "digest" or algorithm != "MD5":
                    best = kind, fields
            elif kind == "basic" and best is None:
                best = kind, fields
        if best is None or not self.given:
            return False
        before, self._kind = (self._kind, self._asked), best[0]
        self._asked, self._count = best[1], 0
        if before[0] != self._kind:
            return True
        # the same question again: the answer was wrong, unless it only was too old
        return best[1].get("stale", "").lower() == "true"

    def answer(self, method: str, target: str) -> str | None:
        """The Authorization of a request; None before a server has asked.

        Args:
            target: of the request, as its first line has it.

        Returns:
            A character for each byte, as heads.head takes it.
        """
        if self._token:
            return f"Bearer {_bytes(self._word)}"  # `https://:token@host/`, as WHIP has it
        if self._kind == "basic":
            return "Basic " + base64.b64encode(f"{self._user}:{self._word}".encode()).decode()
        return self._digest(method, target) if self._kind == "digest" else None

    def _digest(self, method: str, target: str) -> str:
        asked = self._asked
        algorithm = asked.get("algorithm", "MD5")
        make = _HASHES[algorithm.upper().removesuffix("-SESS")]

        def hashed(*parts: str) -> str:
            return make(":".join(parts).encode()).hexdigest()

        realm, nonce = asked.get("realm", ""), asked["nonce"]
        own, count = secrets.token_hex(8), f"{self._count + 1:08x}"
        self._count += 1
        who = hashed(self._user, realm, self._word)
        if algorithm.upper().endswith("-SESS"):
            who = hashed(who, nonce, own)
        what = hashed(method, target)
        said = {"username": _bytes(self._user), "realm": realm, "nonce": nonce, "uri": target}
        if "auth" in re.split(r"[\s,]+", asked.get("qop", "")):
            said["response"] = hashed(who, nonce, count, own, "auth", what)
            plain = f', qop=auth, nc={count}, cnonce="{own}"'
        else:
            said["response"] = hashed(who, nonce, what)
            plain = f', cnonce="{own}"' if algorithm.upper().endswith("-SESS") else ""
        if "opaque" in asked:
            said["opaque"] = asked["opaque"]
        if "algorithm" in asked:
            plain += f", algorithm={algorithm}"
        quoted = ", ".join(f'{name}="{_quoted(value)}"' for name, value in said.items())
        return f"Digest {quoted}{plain}"


def _bytes(value: str) -> str:
    return value.encode().decode("latin-1")


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _challenges(text: str) -> list[tuple[str, dict[str, str]]]:
    """The questions of one header: which kind, and its fields."""
    starts = list(_START.finditer(text[:4096]))
    found = []
    for i, start in enumerate(starts):
        end = starts[i + 1].start() if i + 1 < len(starts) else len(text)
        fields = {
            m[1].lower(): re.sub(r"\\(.)", r"\1", m[2]) if m[2] is not None else m[3]
            for m in _FIELD.finditer(text[start.end() : end])
        }
        if all(v.isprintable() for v in fields.values()):
            found.append((start[1].lower(), fields))
    return found
