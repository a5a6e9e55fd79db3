"""Tries of somebody with a visitor's tickets to have more than their own stream.

Requests are written byte by byte, as no client of good manners would send them.
"""

import asyncio
import base64
import json
import urllib.parse
from dataclasses import dataclass, field

SECONDS = 5.0
EVIL = "http://evil.example"
# what only ComfyUI, the house's files or another's run could have said
SECRETS = (b"python_version", b"class_type", b"KSampler", b"root:", b"import ", b"queue_running",
           b'"token"', b"exec_info", b"JFIF")  # fmt: skip
COMFYUI = (
    "/", "/prompt", "/queue", "/history", "/object_info", "/system_stats", "/settings", "/users",
    "/userdata?dir=.", "/internal/logs", "/internal/files/output", "/api/prompt", "/extensions",
    "/models", "/embeddings", "/view?filename=a.png&type=output", "/view_metadata/loras?filename=a",
    "/livediffusion/mjpeg/x", "/livediffusion/nothing", "/ws?clientId=x",
)  # fmt: skip
CHANGING = (
    ("/prompt", {"prompt": {"1": {"class_type": "SaveImage", "inputs": {}}}}),
    ("/interrupt", {}), ("/free", {"unload_models": True}), ("/queue", {"clear": True}),
    ("/upload/image", {}), ("/history", {"clear": True}), ("/livediffusion/picture", {"view": 0}),
    ("/api/interrupt", {}), ("/settings", {"x": 1}), ("/manager/reboot", {}),
)  # fmt: skip


@dataclass
class Try:
    """One request; `at` is host:port."""

    name: str
    at: str
    path: str
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass
class Known:
    """What the visitor has: its gate's and the house's address, its tickets, its run's keys; and
    another's, which it has found out."""

    gate: str
    house: str
    replica: str
    stream: str
    visit: str
    keys: dict[str, str]
    others_gate: str
    others_replica: str
    others_keys: dict[str, str]
    origin: str


def spoilt(ticket: str) -> dict[str, str]:
    """Tickets that nobody made."""
    body, _, signature = ticket.partition(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))

    def coded(**more):
        text = json.dumps({**claims, **more}).encode()
        return base64.urlsafe_b64encode(text).rstrip(b"=").decode()

    return {
        "none": "", "cut": ticket[:-3], "longer": ticket + "A", "another end": body + ".AAAA",
        "no signature": body, "an operator's": f"{coded(kind='operator')}.{signature}",
        "for longer": f"{coded(exp=4e9)}.{signature}", "another visitor": f"{coded(id='x')}."
        f"{signature}", "twice": f"{ticket}.{ticket}", "long": "A" * 6000,
        "odd characters": "%00%0d%0aX: y",
    }  # fmt: skip


def tries(known: Known) -> list[Try]:
    """All of them."""
    own = {"Origin": known.origin}
    relay = f"/relay/{known.replica}"
    ticket = f"ticket={known.stream}"
    made = []
    for where, at, base in (("gate", known.gate, ""), ("relay", known.house, relay)):

        def add(name, path, where=where, at=at, base=base, **more):
            made.append(Try(f"{where}: {name}", at, base + path, **{"headers": own, **more}))

        def ticketed(path, given=ticket):
            return f"{path}{'&' if '?' in path else '?'}{given}"

        for path in COMFYUI:
            add(f"GET {path}", ticketed(path))
        for path, body in CHANGING:
            add(f"POST {path}", ticketed(path), method="POST", body=json.dumps(body).encode())
        add("a page's socket of ComfyUI", ticketed("/ws?clientId=x"), headers=own | UPGRADE)
        start = json.dumps({"client_id": "x", "prompt": {"values": {}}, "workflow": None}).encode()
        for name, text in spoilt(known.stream).items():
            add(f"ticket: {name}", f"/livediffusion/start?ticket={text}", method="POST", body=start)
        add("ticket: a visit's", f"/livediffusion/start?ticket={known.visit}", method="POST",
            body=start)  # fmt: skip
        add("two tickets", ticketed(ticketed("/livediffusion/start")), method="POST", body=start)
        add("ticket as a cookie", "/prompt", headers=own | {"Cookie": f"ticket={known.stream}; "
            f"livediffusion_operator={known.stream}"})  # fmt: skip
        query = urllib.parse.urlencode(known.others_keys)
        add("another's run, own ticket", ticketed(f"/livediffusion/stats?{query}"))
        add("another's pictures, own ticket",
            ticketed(f"/livediffusion/frames?{query}&role=owner"), headers=own | UPGRADE)
        body = json.dumps({**known.others_keys, "prompt": {"values": {}}}).encode()
        for route in ("update", "stop"):
            add(f"{route} another's run", ticketed(f"/livediffusion/{route}"), method="POST",
                body=body)  # fmt: skip
        mine = urllib.parse.urlencode({**known.keys, "token": "A" * 32})
        add("own run, a guessed token", ticketed(f"/livediffusion/stats?{mine}"))
        for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "HEAD", "PROPFIND"):
            add(f"{method} start", ticketed("/livediffusion/start"), method=method)
        for path in (
            "/livediffusion/start/../../prompt", "/livediffusion/%2e%2e/prompt", "//prompt",
            "/livediffusion/..%2fprompt", "/livediffusion/..;/prompt", "/./prompt",
            "/livediffusion/frames/../../../system_stats", "/livediffusion\\..\\prompt",
            "/livediffusion/start%00/prompt", "/LIVEDIFFUSION/START", "/livediffusion/start/",
            "/%6civediffusion/picture",
        ):  # fmt: skip
            add(f"path {path}", ticketed(path))
        for name, more in {
            "another page's origin": {"Origin": EVIL}, "no origin, cross-site": {
                "Sec-Fetch-Site": "cross-site"}, "origin null": {"Origin": "null"},
            "its host, its origin": {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"},
        }.items():  # fmt: skip
            add(name, ticketed("/livediffusion/start"), method="POST", body=start, headers=more)
            query = urllib.parse.urlencode(known.keys)
            add(f"{name}, frames", ticketed(f"/livediffusion/frames?{query}&role=owner"),
                headers=more | UPGRADE)  # fmt: skip
        large = json.dumps({"prompt": {"values": {"1.mirror": "x" * 2**19}}}).encode()
        add("half a megabyte", ticketed("/livediffusion/start"), method="POST", body=large)
        add("packed", ticketed("/livediffusion/start"), method="POST", body=start,
            headers=own | {"Content-Encoding": "gzip"})  # fmt: skip
        much = "x" * 10**5
        add("a header of 100 kB", ticketed("/livediffusion/stats"), headers=own | {"X": much})
        add("an address of 100 kB", ticketed(f"/livediffusion/stats?x={much}"))
        add("no JSON", ticketed("/livediffusion/start"), method="POST", body=b"\xff{")
        add("deep JSON", ticketed("/livediffusion/start"), method="POST", body=b"[" * 10**5)
        for values in (
            {"1.file": "../../../etc/passwd"}, {"1.source": "file"}, {"2.filename_prefix": "/x"},
            {"1.mirror": "/etc/passwd"}, {"2.record": True}, {"__class__.x": 1}, {"1.fps": 1e9},
        ):  # fmt: skip
            body = json.dumps({**known.keys, "prompt": {"values": values}}).encode()
            add(f"sets {values}", ticketed("/livediffusion/update"), method="POST", body=body)
    made += elsewhere(known, ticket, own, start)
    return made


def elsewhere(known: Known, ticket: str, own: dict[str, str], start: bytes) -> list[Try]:
    """At other doors: another's gate, the house's own addresses."""
    made = [
        Try("own ticket at another's gate", known.others_gate, f"/livediffusion/start?{ticket}",
            "POST", own, start),
        Try("own ticket, another's relay", known.house,
            f"/relay/{known.others_replica}/livediffusion/start?{ticket}", "POST", own, start),
        Try("a replica that is none", known.house, f"/relay/x/livediffusion/start?{ticket}",
            "POST", own, start),
        Try("relay to an address", known.house, f"/relay/127.0.0.1:22/?{ticket}", headers=own),
        Try("relay out of itself", known.house,
            f"/relay/{known.replica}/../../operator/state?{ticket}", headers=own),
        Try("relay out of itself, coded", known.house,
            f"/relay/{known.replica}/%2e%2e/%2e%2e/operator/state?{ticket}", headers=own),
        Try("a proxy's request", known.gate, f"http://169.254.169.254/latest?{ticket}"),
        Try("a page of another site, /visit", known.house, "/visit", headers={
            "Origin": EVIL} | UPGRADE),
    ]  # fmt: skip
    for given in (known.stream, known.visit, ""):
        name = {known.stream: "a stream's", known.visit: "a visit's"}.get(given, "no")
        for path in ("/operator", "/operator/state"):
            made.append(Try(f"{path}, {name} ticket", known.house, f"{path}?ticket={given}"))
        made.append(Try(f"an order, {name} ticket", known.house, f"/operator/order?ticket={given}",
                        "POST", own, b'{"replicas": 0}'))  # fmt: skip
        made.append(Try(f"an operator's cookie, {name} ticket", known.house, "/operator/state",
                        headers={"Cookie": f"livediffusion_operator={given}; operator={given}; "
                                 f"ticket={given}"}))  # fmt: skip
    for path in ("/page/../serve/tickets.py", "/page/%2e%2e/tickets.py", "/web/live/../../run.py",
                 "/web/live/..%2f..%2f..%2f..%2fetc/passwd", "/page//etc/passwd", "/etc/passwd",
                 "/metrics", "/docs", "/openapi.json", "/-/routes", "/-/healthz/../routes",
                 "/api/serve/applications/", "/prompt", "/serve/main.py"):  # fmt: skip
        made.append(Try(f"the house: {path}", known.house, path, headers=own))
    return made


UPGRADE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": base64.b64encode(b"0" * 16).decode(),
}  # fmt: skip


async def answer(one: Try) -> tuple[int, bytes]:
    """Status and the beginning of what came; 0 where the connection was closed or kept silent."""
    host, _, port = one.at.rpartition(":")
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), SECONDS)
    headers = {"Host": one.at, **one.headers}
    if "Upgrade" not in headers:
        headers |= {"Connection": "close"}
    if one.body is not None:
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(one.body))}
    text = f"{one.method} {one.path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in headers.items()
    )
    came = b""
    try:
        writer.write(text.encode() + b"\r\n" + (one.body or b""))
        # a door that is shut in the middle of it is an answer, too
        while len(came) < 2**16 and (more := await asyncio.wait_for(reader.read(4096), 2.0)):
            came += more
    except (asyncio.TimeoutError, ConnectionError, OSError):
        pass
    finally:
        writer.close()
    status = came.split(b" ", 2)[1:2]
    return (int(status[0]) if status and status[0].isdigit() else 0), came


def refused(status: int, came: bytes) -> bool:
    """Whether nothing was opened."""
    body = came.partition(b"\r\n\r\n")[2]
    return (status == 0 or status >= 400) and not any(secret in body for secret in SECRETS)


async def tried(there, one, other) -> list[dict[str, object]]:
    """What visitor `one` of a house gets by trying.

    Args:
        there: a house.House. one, other: visitors.Visitor whose streams run, at two replicas.
    """
    state = await asyncio.to_thread(there.state)
    addresses = {name: said["address"] for name, said in state["replica"].items()}
    known = Known(
        addresses[one.replica], there.url.partition("//")[2], one.replica, one._now.ticket,
        one.ticket, one._now._keys, addresses[other.replica], other.replica, other._now._keys,
        there.url,
    )  # fmt: skip
    rows = []
    for entry in tries(known):
        status, came = await answer(entry)
        rows.append({"try": entry.name[:80], "status": status, "refused": refused(status, came)})
        # its own stream goes on, and the doors count requests
        await asyncio.sleep(0.01)
    return rows
