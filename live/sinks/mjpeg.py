"""A view as an MJPEG stream: its address, and how its pictures are written."""

import base64
import hashlib
import hmac
import json
import re
import secrets

_BOUNDARY = "livediffusion"
_SECRET = re.compile(r"[\x21-\x7e]{16,200}", re.A)
CONTENT_TYPE = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"


class Keys:
    """Makes and knows the keys in addresses, and keeps none of them.

    A key belongs to whoever has the secret that it was made from, and says itself that it is of
    this server. Who does not have the secret gets other keys, whatever workflow they name.
    """

    def __init__(self):
        self._own = secrets.token_bytes(32)

    def key(self, secret: str, workflow: str, node: str) -> str:
        """The key of a view; the same for each run of a workflow with the same secret."""
        name = self._digest("view", secret, workflow, node)
        return f"{name}.{self._digest('ours', name)}"

    def known(self, key: str) -> bool:
        """Whether this server made the key."""
        name, _, seal = key.partition(".")
        return hmac.compare_digest(
            self._digest("ours", name).encode(), seal.encode(errors="replace")
        )

    def _digest(self, *parts: str) -> str:
        made = hmac.digest(self._own, json.dumps(parts).encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(made[:18]).decode()


def secret(sent: object) -> str:
    """The secret that a page sent with its graph, or a fresh one for who sent none that is one."""
    if isinstance(sent, str) and _SECRET.fullmatch(sent):
        return sent
    return secrets.token_urlsafe(24)


class Parts:
    """Pictures as the parts of one endless answer.

    Chromium shows a part when the header of the next has come. For browsers that header goes out
    with the picture before it, and so cannot give a length. Others take a part by its length, and
    would wait for more bytes without it: they get it, and the boundary at once.

    Args:
        agent: the User-Agent of who asks.
    """

    def __init__(self, agent: str):
        # OBS's browser source is Chromium, its media source is FFmpeg
        self._browser = "Mozilla/" in agent
        self._first = True

    def part(self, data: bytes) -> bytes:
        """What to write for a picture, JPEG."""
        opening = f"--{_BOUNDARY}\r\n".encode()
        head = b"Content-Type: image/jpeg\r\n"
        before, after = b"", b"\r\n" + opening
        if self._browser:
            after += head + b"\r\n"
        else:
            before = head + f"Content-Length: {len(data)}\r\n\r\n".encode()
        if self._first:
            before = opening + before + (head + b"\r\n" if self._browser else b"")
            self._first = False
        return before + data + after
