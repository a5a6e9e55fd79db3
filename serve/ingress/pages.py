"""What the one address gives to anybody: the visitor's page, the pack's own modules, their words.

A table that is read once, at the start: a name that is not in it is not there, so no name can lead
out of it. What can be packed is packed once, too.
"""

import gzip
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
TYPES = {
    ".html": "text/html; charset=utf-8", ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8", ".json": "application/json", ".svg": "image/svg+xml",
    ".png": "image/png", ".ico": "image/x-icon", ".woff2": "font/woff2",
}  # fmt: skip
_PACKED = {".html", ".mjs", ".css", ".json", ".svg"}
_LEAST = 1024  # bytes below which packing gains nothing


class File(NamedTuple):
    """One answer: its bytes, the same packed or None, its content type and tag."""

    data: bytes
    packed: bytes | None
    kind: str
    tag: str


def files(root: pathlib.Path = ROOT) -> dict[str, File]:
    """Every address that is given out, with what is there."""
    found = {}
    shown = (root / "serve" / "page", "/page", set(TYPES))
    for folder, under, kinds in (shown, (root / "web" / "live", "/web/live", {".mjs"})):
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix in kinds and path.is_file() and not path.is_symlink():
                address = f"{under}/{path.relative_to(folder).as_posix()}"
                found[address] = file(path.read_bytes(), path.suffix)
    if "/page/index.html" in found:
        found["/"] = found["/page/index.html"]
    found["/i18n"] = file(json.dumps(words(root), ensure_ascii=False).encode(), ".json")
    return found


def file(data: bytes, suffix: str) -> File:
    packed = gzip.compress(data, mtime=0) if suffix in _PACKED and len(data) >= _LEAST else None
    return File(data, packed, TYPES[suffix], f'"{hashlib.sha256(data).hexdigest()[:16]}"')


def words(root: pathlib.Path = ROOT) -> dict[str, Any]:
    """The pack's words in other languages, put together as ComfyUI's /i18n does it."""
    found: dict[str, Any] = {}
    for main in sorted((root / "locales").glob("*/main.json")):
        own = json.loads(main.read_text(encoding="utf-8"))
        for name in ("commands", "settings", "nodeDefs"):
            path = main.with_name(f"{name}.json")
            if path.is_file():
                own[name] = json.loads(path.read_text(encoding="utf-8"))
        found[main.parent.name] = own
    return found


def headers(direct: bool, host: str = "", styled: bool = False) -> dict[str, str]:
    """The headers of every answer of the house's own.

    Args:
        direct: whether pages may talk to replicas' own ports, which are other origins.
        host: the name that replicas' ports have for pages, if it is one.
        styled: whether a page has its styles in itself.
    """
    # a replica's port is known only when it is there; where its machine is known, that alone
    others = [f"{scheme}//{host}:*" if host else scheme for scheme in ("http:", "ws:") if direct]
    style = "'self' 'unsafe-inline'" if styled else "'self'"
    policy = {
        "default-src": "'none'", "script-src": "'self'", "style-src": style,
        "img-src": "'self' blob: data:", "media-src": "'self' blob:", "worker-src": "'self'",
        "connect-src": " ".join(["'self'", *others]), "manifest-src": "'self'",
        "font-src": "'self'", "base-uri": "'none'", "form-action": "'self'",
        "frame-ancestors": "'none'",
    }  # fmt: skip
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin", "X-Frame-Options": "DENY",
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "Cache-Control": "no-cache",
    }  # fmt: skip
