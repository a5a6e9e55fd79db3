"""The trust boundary: who may talk, what is read from JSON, which files, what may be imported.

Everything that a stranger can reach passes here: another site's page, a shared workflow, an engine
or a schedule that somebody handed on. The rooms above ask; the rules stand in this file alone.
"""

import ipaddress
import ntpath
import os
import pathlib
import re
import stat
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from .addresses import is_loopback
from .schema import (
    BadData,
    Limits,
    Schema,
    anything,
    either,
    fields,
    flag,
    items,
    nothing,
    number,
    one_of,
    parsed,
    record,
    shown,
    table,
    text,
    unchanged,
    whole,
)

# -- how much --------------------------------------------------------------------------------

REQUEST = Limits(bytes=20 * 2**20, depth=100, items=500_000)
MESSAGE = Limits(bytes=4096, depth=4, items=64)
KEPT = Limits(REQUEST.bytes + 2**16, REQUEST.depth + 4, REQUEST.items + 1000)
SETTINGS = Limits(bytes=4 * 2**20, depth=100, items=500_000)
SIDECAR = Limits(bytes=4 * 2**20, depth=8, items=100_000)
RESULT = Limits(bytes=2**20, depth=8, items=20_000)
RUNTIME_CACHE = 2**28  # bytes of what was compiled for an engine; more costs more than it saves

MOST_RUNS = 16  # live runs of a server that wait or run
MOST_RUNS_OF_ONE = 8  # of them, of one page
MOST_KEPT = 1  # without a page; ComfyUI runs one prompt at a time
MOST_NODES = 3000  # of a graph
MOST_VIEWS = 32  # of one run
MOST_LISTENERS = 32  # of one run
MOST_PEERS = 24  # WebRTC connections of a server
MOST_PEERS_OF_RUN = 8  # of them, of one run
MOST_OPEN = 64  # frame sockets of a server, and as many MJPEG streams; they need a token or a key

# -- what is read from JSON ------------------------------------------------------------------

_NAME = text(256)
_KEY = text(64, r"[\w-]+")
# unet_config and the like: plain values, small enough for whatever is made of them
_PLAIN_VALUE = either(nothing, flag, number(-1e6, 1e6), text(256))
_PLAIN_LIST = items(either(_PLAIN_VALUE, items(_PLAIN_VALUE, 0, 64)), 0, 64)


def _lists(value: Any, where: str) -> Any:
    """Plain values with lists as lists, as a model's configuration has them."""
    if isinstance(value, list):
        return [list(one) if isinstance(one, tuple) else one for one in _PLAIN_LIST(value, where)]
    return _PLAIN_VALUE(value, where)


_PLAIN = table(_KEY, _lists, 256)

_RUN_KEYS = {"session": anything, "token": anything}  # see is_key
_NODE = record(
    {"class_type": _NAME, "inputs": table(_NAME, anything, 1000)},
    {"_meta": table(_NAME, anything, 100)},
    others=True,
)
_NODES = unchanged(table(_NAME, _NODE, MOST_NODES))


def _graph(value: Any, where: str) -> dict[str, Any]:
    try:
        return _NODES(value, "prompt")
    except BadData as reason:
        why = str(reason).rstrip(".")
        raise BadData(f"This is not a graph in ComfyUI's API format ({why}).") from None


# ComfyUI's page reads the id of every job's
_ID = either(nothing, text(256))
_WORKFLOW = either(nothing, unchanged(record({}, {"id": _ID}, others=True)))

# requests and messages: what is not known is left out, for a page that is newer than the server
START = record(
    {"prompt": _graph},
    {
        "workflow": _WORKFLOW, "client_id": _NAME, "secret": either(nothing, text(200)),
        "unattended": flag, "name": _NAME,
    },
    others=True,
)  # fmt: skip
UPDATE = record({"prompt": _graph}, {"workflow": _WORKFLOW, **_RUN_KEYS}, others=True)
STOP = record({}, _RUN_KEYS, others=True)
KEEP = record({}, {"name": _NAME, **_RUN_KEYS}, others=True)
RUN = record({"run": _KEY}, others=True)  # one that is kept without a page
PICTURE = record({"node": _NAME}, _RUN_KEYS, others=True)
SNAPSHOT = record({"node": text(256, r".+"), "client_id": text(256, r".+")}, others=True)
SOURCES = record(
    {"kind": one_of("device", "address", "ndi", "spout", "syphon")}, others=True
)
# 'what' is an address or the name of a device
ALLOW = record({"kind": one_of("address", "device"), "what": text(1024, r".+")}, others=True)
_VIEW = whole(0, 2**16)
HEARD = either(
    record(
        {"type": one_of("shown"), "view": _VIEW},
        {"latency_ms": either(nothing, number(-1e16, 1e16))},  # a clock may be anything
        others=True,
    ),
    record({"type": one_of("compare"), "view": _VIEW}, {"on": flag}, others=True),
    record({"type": one_of("elsewhere"), "view": _VIEW, "on": flag}, others=True),
)

# of ComfyUI's settings
UNATTENDED = record({}, {"livediffusion.startUnattended": flag}, others=True)

# files: what is not known is refused
ALLOWED = record(
    {}, {"addresses": items(text(1024), 0, 1000), "devices": items(text(256), 0, 1000)}
)
SECRETS = table(text(32, r"[a-z0-9]+"), record({"secret": text(1024), "for": text(512)}), 1000)
_KEPT_RUN = record(
    {"run": _KEY, "name": _NAME, "graph": _graph, "since": number(0, 1e12)},
    {"workflow": _WORKFLOW},
)
KEPT_RUNS = record({"livediffusion": one_of(1), "runs": items(_KEPT_RUN, 0, MOST_KEPT)})
_CLASS = fields(text(64, r"[\w.]+"), text(64, r"[A-Za-z]\w*"))
FAMILY = record(
    {
        "base": _CLASS,
        "config": _CLASS,
        "unet_config": _PLAIN,
        "sampling_settings": _PLAIN,
        "model_type": text(64, r"\w+"),
        "memory_usage_factor": number(0, 1000),
    }
)
_SHAPE = items(whole(1, 2**24), 1, 6)
_LAYERS = items(text(64, r"[\w.]+"), 0, 256)
_MADE = record(
    {
        "gpu": _NAME,
        "capability": _NAME,
        "cuda_driver": whole(0, 10**6),
        "tensorrt": _NAME,
        "exporter": whole(0, 10**6),
        "opset": whole(0, 10**4),
        "precision": one_of("fp16", "bf16", "fp32"),
        "model": _NAME,
        "inputs": items(_KEY, 1, 1024),
        "profile": table(_KEY, fields(_SHAPE, _SHAPE, _SHAPE), 1024),
        "flags": items(_KEY, 0, 16),
    },
    {
        "library": one_of("tensorrt", "tensorrt-rtx"),
        "targets": items(text(8, r"\d{1,2}\.\d"), 0, 16),
        "layers": either(
            nothing, record({"ahead": _LAYERS, "behind": _LAYERS, "fused": _LAYERS})
        ),
        "frames": whole(1, 64),
        "depth": either(nothing, whole(0, 255)),
    },
)
ENGINE = record(
    {
        "format": whole(0, 10**6),
        "made": _MADE,
        "family": either(record({}), FAMILY),
        "weights": table(text(256), fields(text(256), flag), 20_000),
        "built": table(_KEY, _PLAIN_VALUE, 16),
        "size": whole(0, 2**42),
        "digest": text(64, r"[0-9a-f]{64}|"),
    }
)
_LEVEL = number(0, 1e6)
_ERROR = number(-1e30, 1e30)
# of a UNet: side, number of the block, place in it
_BODY = text(32, r"(input|middle|output)\.\d{1,3}\.\d{1,3}")
SCHEDULE = record(
    {
        "livediffusion": whole(0, 10**6),
        "method": one_of("learned", "searched"),
        "solver": _KEY,
        "levels": items(_LEVEL, 2, 1001),
        "shifts": items(number(-100, 100), 0, 4000),
        "goal": _NAME,
        "errors": table(_NAME, fields(_ERROR, _ERROR), 8),
        "hand_made": _NAME,
        "model": _NAME,
        "rounds": fields(whole(0, 10**9), whole(0, 10**9)),
    },
    {
        "asked": table(_NAME, either(nothing, flag, number(-1e30, 1e30), text(256)), 64),
        "curves": table(_NAME, items(_LEVEL, 0, 1001), 64),
        "date": _NAME,
        "skips": items(items(_BODY, 0, 500), 0, 1000),
        "flops": number(0, 1),
        "whole": table(_NAME, fields(_ERROR, _ERROR), 8),
    },
)


def told(data: bytes, what: str, limits: Limits, schema: Schema) -> Any:
    """The value of a JSON text as a schema gives it. Raises BadData."""
    return schema(parsed(data, what, limits), what)


def is_key(value: Any) -> bool:
    """Whether this can be a session's id or token, or the key of a stream."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value) is not None


# -- what may be imported --------------------------------------------------------------------

# where a model's classes may stand, and what they must come from; a name that begins with a dot is
# a module of this pack. Nothing else is ever imported or looked up for a file.
MODEL_CLASSES = {
    "base": ("comfy.model_base", ".demo.loader"),
    "config": ("comfy.supported_models", "comfy.supported_models_base", ".demo.loader"),
}


# -- which files -----------------------------------------------------------------------------


def inside(folder: str | os.PathLike, name: Any, what: str, where: str) -> pathlib.Path:
    """The file `name` in a folder.

    Args:
        name: as it came: a node's input may be linked, and then it is of any type.
        what: names the node's input, `where` the folder, for the message.

    Raises:
        ValueError: it is no name, there is no such file, or it lies elsewhere: .., absolute names,
            drives, links out.
    """
    if not isinstance(name, str):
        raise BadData(f"{what}: the name of a file is expected, not {shown(name)}.")
    if not is_relative(name):
        raise BadData(f"{what}: {shown(name)} is not inside {where}. Choose one there.")
    base = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(base, name))
    if not path.startswith(base.rstrip(os.sep) + os.sep):
        raise BadData(f"{what}: {shown(name)} is not inside {where}. Choose one there.")
    if not os.path.isfile(path):
        raise BadData(f"{what}: there is no {shown(name)} in {where}. Choose another.")
    return pathlib.Path(path)


def is_relative(name: str, windows: bool = os.name == "nt") -> bool:
    """Whether a name can only lead downwards, on any system, whatever lies there.

    Args:
        windows: streams (`name:stream`) are told by a colon, which elsewhere is a letter.
    """
    parts = re.split(r"[/\\]", name)
    return (
        0 < len(name) <= 1024
        and not any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name)
        and not ntpath.splitdrive(name)[0]
        and "" not in parts
        and ".." not in parts
        and not (windows and ":" in name)
    )


def contents(path: pathlib.Path, most: int) -> bytes:
    """Of a plain file of at most so many bytes. Never waits, as a pipe would have it.

    Raises:
        OSError: it cannot be read, or is no plain file.
        BadData: it is larger.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is no plain file")
        data = file.read(most + 1)
    if len(data) > most:
        raise BadData(f"{path.name} is larger than {most} bytes.")
    return data


# -- who may talk ----------------------------------------------------------------------------

_PORTS = {"http": 80, "https": 443}


def stranger(headers: Mapping[str, str], cors: str | None = None) -> str | None:
    """Why a request is not taken: another site's page sent it. None for our own page and programs.

    A page of another site cannot choose Host, Origin or Sec-Fetch-Site; it cannot send
    X-Forwarded-Host either, because ComfyUI allows no such header to other sites, and a WebSocket
    carries none. So a proxy that changes Host may say by X-Forwarded-Host what it was.

    Args:
        headers: of the request.
        cors: the origin that ComfyUI was told to let in, "*" for any (--enable-cors-header).
    """
    origin = headers.get("Origin")
    if cors is not None and origin is not None and cors in ("*", origin):
        return None
    if headers.get("Sec-Fetch-Site", "same-origin") in ("cross-site", "same-site"):
        return "This request comes from another site."
    if origin is None:
        return None
    host, forwarded = headers.get("Host", ""), headers.get("X-Forwarded-Host", "")
    # each proxy on the way adds its own behind a comma
    asked = [place(name) for name in (host, forwarded.partition(",")[0].strip()) if name]
    if any(_same(origin, one) for one in asked if one is not None):
        return None
    return (
        f"Origin {shown(origin)} is not this server ({shown(host)}). Behind a proxy, have it pass "
        "on what the browser asked for: Host with its port (nginx: proxy_set_header Host "
        "$http_host), or the same as X-Forwarded-Host."
    )


_FORWARDED = ("Forwarded", "Via", "X-Real-IP", "CF-Connecting-IP", "True-Client-IP")


def at_server(headers: Mapping[str, str], peer: str | None) -> bool:
    """Whether a request is of somebody who sits at this machine: a page on localhost, a program.

    A proxy on this machine is told by its headers; one that adds none lets a program elsewhere that
    says `Host: localhost` pass for one here (docs/live.md, Behind a proxy). A name that was made to
    lead here (DNS rebinding) is no localhost. Another site's page is a stranger, whatever
    --enable-cors-header says.

    Args:
        headers: of the request.
        peer: the IP address that it came from.
    """
    host = place(headers.get("Host", ""))
    return (
        stranger(headers) is None
        and host is not None
        and (host[0] == "localhost" or _is_loopback(host[0]))
        and _is_loopback(peer or "")
        and not any(
            name.lower().startswith("x-forwarded-") or name.title() in _titles for name in headers
        )
    )


_titles = {name.title() for name in _FORWARDED}


def _is_loopback(ip: str) -> bool:
    try:
        return is_loopback(ipaddress.ip_address(ip.partition("%")[0]))
    except ValueError:
        return False


def _same(origin: str, host: tuple[str, int | None]) -> bool:
    scheme, _, rest = origin.partition("://")
    port = _PORTS.get(scheme.lower())
    here = place(rest)
    if port is None or here is None:
        return False
    # where the port is lost, as with nginx's $host, the name has to do; ComfyUI does the same
    return here[0] == host[0] and (host[1] is None or (here[1] or port) == host[1])


def place(host: str) -> tuple[str, int | None] | None:
    """Name and port of `name:port`, `name` or `[address]:port`; None for anything else."""
    if not re.fullmatch(r"[\w.:\[\]-]{1,300}", host, re.ASCII):
        return None
    try:
        parts = urlsplit(f"//{host}")
        name, port = parts.hostname or "", parts.port
        if ":" in name:
            name = str(ipaddress.ip_address(name))
    except ValueError:
        return None
    return (name, port) if name else None
