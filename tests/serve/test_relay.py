"""The way to a gate through the one address, and what the address gives to anybody."""

import asyncio
import contextlib
import gzip
import pathlib

from aiohttp import WSMsgType, web
from serving import ROOT, served

relay, tickets, pages = served("ingress.relay"), served("tickets"), served("ingress.pages")
DAY = 86400  # seconds: tickets are made when this is collected, minutes before it runs
KEYS = tickets.Tickets(b"k" * 32)
LIVE = "/relay/r1/livediffusion/"


def stream(**claims):
    return KEYS.make(tickets.STREAM, DAY, **{"id": "v", "replica": "r1", **claims})


OPERATOR = KEYS.make(tickets.OPERATOR, DAY, id="operator")
VISIT = KEYS.make(tickets.VISIT, DAY, id="v", replica="r1")
OLD = tickets.Tickets(b"k" * 32, lambda: 1.0).make(tickets.STREAM, DAY, id="v", replica="r1")
OTHERS = tickets.Tickets(b"o" * 32).make(tickets.STREAM, DAY, id="v", replica="r1")


async def ask(house, path, query="", kind="http", method="GET", headers=(), body=(b"",)):
    """One request of an ASGI server; what was sent to it."""
    given, sent = list(body), []

    async def receive():
        if kind == "websocket":
            return given.pop(0) if given else await asyncio.Event().wait()
        part = given.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(given)}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "raw_path": path.encode(), "method": method,
             "query_string": query.encode(), "headers": list(headers),
             "subprotocols": []}  # fmt: skip
    await house(scope, receive, send)
    return sent


@contextlib.asynccontextmanager
async def house(handler):
    """A relay, and behind it a gate that answers with `handler`."""
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    made = relay.Relay(KEYS, {"r1": f"127.0.0.1:{port}", "r2": "127.0.0.1:9"}.get, 100)
    try:
        yield made
    finally:
        await made.close()
        await runner.cleanup()


CLOSED = [
    (LIVE + "start", "", 403), (LIVE + "start", "ticket=", 403), (LIVE + "start", "ticket=x", 403),
    (LIVE + "start", f"ticket={VISIT}", 403), (LIVE + "start", f"ticket={OLD}", 403),
    (LIVE + "start", f"ticket={OTHERS}", 403), (LIVE + "start", f"ticket={stream()}x", 403),
    (LIVE + "start", f"ticket={stream(replica='r2')}", 403),
    (LIVE + "start", f"ticket={stream(replica=None)}", 403),
    *[(f"/relay/r1{path}", f"ticket={stream()}", 403) for path in (
        "/", "/prompt", "/object_info", "/view", "/system_stats", "/ws", "/api/prompt", "/queue",
        "/livediffusion", "/livediffusion/", "/livediffusion/../prompt", "/livediffusion//start",
        "/livediffusion/start/", "/livediffusion/start/../../prompt", "/livediffusion/%2e%2e/ws",
        "/livediffusion/start%00", "/LIVEDIFFUSION/start", "/livediffusion/start;x", "//prompt",
        "/upload/image", "/internal/logs", "/extensions",
    )],
    ("/relay/", f"ticket={OPERATOR}", 404), ("/relay/r1", f"ticket={OPERATOR}", 404),
    ("/relay/../r1/", f"ticket={OPERATOR}", 404), ("/relay/none/", f"ticket={OPERATOR}", 503),
    ("/relay/r2/", f"ticket={OPERATOR}", 503), ("/relay/r 1/", f"ticket={OPERATOR}", 404),
]  # fmt: skip


def test_what_a_ticket_does_not_open_is_not_asked_of_the_gate():
    asked = []

    async def gate(request):
        asked.append(request.path)
        return web.Response()

    async def tries():
        async with house(gate) as made:
            for kind in ("http", "websocket"):
                for path, query, status in CLOSED:
                    body = [{"type": "websocket.connect"}] if kind == "websocket" else [b""]
                    sent = await ask(made, path, query, kind, body=body)
                    got = sent[0].get("status") or sent[0]["code"] - 4000
                    assert got == status, (kind, path, query)
            assert not made._sockets and not made._requests

    asyncio.run(tries())
    assert not asked


def test_an_operator_whose_cookie_is_over_reads_so():
    old = tickets.Tickets(b"k" * 32, lambda: 1.0).make(tickets.OPERATOR, DAY, id="operator")
    head = [(b"cookie", f"{relay.COOKIE}={old}".encode())]

    async def asked():
        made = relay.Relay(KEYS, {}.get, 9)
        return await ask(made, "/relay/r1/", headers=head), await ask(made, "/relay/r1/")

    over, nothing = asyncio.run(asked())
    assert over[0]["status"] == nothing[0]["status"] == 403
    assert b"over: take the one" in over[1]["body"] and b"needed" in nothing[1]["body"]


def test_requests_pass_as_they_are_and_without_what_is_nobody_s_business():
    seen = []

    async def gate(request):
        seen.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        return web.Response(body=b"answer", status=201, headers={"X-Own": "1"})

    async def passes():
        async with house(gate) as made:
            query = f"ticket={stream()}&session=a%2Fb"
            head = [(b"origin", b"http://house"), (b"cookie", b"a=b"), (b"host", b"house"),
                    (b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-host", b"art.example"),
                    (b"content-type", b"application/json")]
            sent = await ask(made, LIVE + "start", query, method="POST", headers=head,
                             body=(b'{"a":', b"1}"))  # fmt: skip
            assert sent[0]["status"] == 201
            assert (b"x-own", b"1") in sent[0]["headers"]
            assert b"".join(part["body"] for part in sent[1:]) == b"answer"
            (method, path, headers, body), = seen
            assert (method, path, body) == ("POST", f"/livediffusion/start?{query}", b'{"a":1}')
            assert headers["Origin"] == "http://house" and headers["Host"] == "house"
            # where a proxy before the house changes Host, an operator's page is known by this
            assert headers["X-Forwarded-Host"] == "art.example"
            assert not {"Cookie", "X-Forwarded-For"} & set(headers)
            large = (b"x" * 40_000,) * 2
            sent = await ask(made, LIVE + "start", query, method="POST", body=large)
            assert sent[0]["status"] == 413 and len(seen) == 1
            cookie = [(b"cookie", f"x=y; {relay.COOKIE}={OPERATOR}".encode())]
            await ask(made, "/relay/r1/view%2Fa", "", headers=cookie)
            assert seen[1][1] == "/view%2Fa"
            assert seen[1][2]["Cookie"] == f"{relay.COOKIE}={OPERATOR}"

    asyncio.run(passes())


def test_a_gate_that_says_nothing_is_waited_for_only_so_long(monkeypatch):
    """Or the eight requests that a visitor may have at a time would be spent."""
    monkeypatch.setattr(relay, "_ANSWERED", 0.2)

    async def gate(request):
        await asyncio.sleep(0.6)
        return web.Response()

    async def passes():
        async with house(gate) as made:
            asked = (ask(made, LIVE + "update", f"ticket={stream()}", method="POST"),
                     ask(made, "/relay/r1/history", f"ticket={OPERATOR}"))  # fmt: skip
            return [sent[0]["status"] for sent in await asyncio.gather(*asked)]

    assert asyncio.run(passes()) == [503, 200]


def test_frames_pass_unread_both_ways_and_the_far_end_s_goodbye_with_them():
    frames = [bytes([i]) * size for i, size in enumerate((0, 1, 5000, 4 << 20))]

    left = asyncio.Queue()

    async def gate(request):
        socket = web.WebSocketResponse(max_msg_size=8 << 20)
        await socket.prepare(request)
        for _ in frames:
            message = await socket.receive()
            if message.type is WSMsgType.CLOSE:
                left.put_nowait(socket.close_code)
                return socket
            await socket.send_bytes(message.data)
        await socket.send_str("text")
        await socket.close(code=4409)
        return socket

    async def passes():
        async with house(gate) as made:
            said = [{"type": "websocket.connect"},
                    *({"type": "websocket.receive", "bytes": frame} for frame in frames)]
            query = f"ticket={stream()}"
            sent = await ask(made, LIVE + "frames", query, "websocket", body=said)
            assert sent[0]["type"] == "websocket.accept"
            assert [message.get("bytes") for message in sent[1:-2]] == frames
            assert sent[-2]["text"] == "text" and sent[-1]["code"] == 4409
            # a page that goes away takes its connection with it; the gate hears whether its browser
            # closed it, or it was lost
            for code, told in ((1001, 1001), (1006, 1000), (1005, 1000), (4000, 1000)):
                said = [{"type": "websocket.connect"},
                        {"type": "websocket.disconnect", "code": code}]
                await asyncio.wait_for(ask(made, LIVE + "frames", query, "websocket", body=said), 5)
                assert await asyncio.wait_for(left.get(), 5) == told and not made._sockets

    asyncio.run(passes())


def test_a_visitor_has_a_few_sockets_at_a_time_and_no_more():
    async def gate(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        return socket

    async def many():
        async with house(gate) as made:
            open_ = [asyncio.ensure_future(ask(
                made, LIVE + "frames", f"ticket={stream()}", "websocket",
                body=[{"type": "websocket.connect"}])) for _ in range(relay._SOCKETS)]  # fmt: skip
            while sum(made._sockets.values()) < relay._SOCKETS:
                await asyncio.sleep(0.01)
            last = [{"type": "websocket.connect"}]
            sent = await ask(made, LIVE + "frames", f"ticket={stream()}", "websocket", body=last)
            assert sent[0]["code"] == 4429
            for one in open_:
                one.cancel()
            await asyncio.gather(*open_, return_exceptions=True)
            assert not +made._sockets

    asyncio.run(many())


def test_only_what_is_listed_is_given_out():
    found = pages.files()
    assert {"/", "/i18n", "/web/live/session.mjs", "/page/index.html"} <= set(found)
    for address, file in found.items():
        path = ROOT / ("serve" if address.startswith("/page/") else "") / address.lstrip("/")
        if address not in ("/", "/i18n"):
            assert file.data == path.read_bytes()
        assert path.suffix != ".py" and ".." not in address
        if file.packed is not None:
            assert gzip.decompress(file.packed) == file.data


def test_links_and_other_files_in_the_page_s_folder_are_not_given_out(tmp_path):
    page = tmp_path / "serve" / "page"
    page.mkdir(parents=True)
    (tmp_path / "secret.json").write_text("{}")
    (page / "a.json").symlink_to(tmp_path / "secret.json")
    for name in ("index.html", "b.py", "c", ".hidden", "d.mjs.bak"):
        (page / name).write_text("x")
    assert set(pages.files(tmp_path)) == {"/", "/page/index.html", "/i18n"}


def test_pages_run_nothing_but_their_own_scripts():
    for direct, host in ((True, ""), (True, "127.0.0.1"), (False, "")):
        policy = pages.headers(direct, host)["Content-Security-Policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'"
        assert "unsafe" not in policy
        others = {"http://127.0.0.1:*", "ws://127.0.0.1:*"} if host else {"http:", "ws:"}
        assert set(rules["connect-src"].split()) == {"'self'"} | (others if direct else set())
    markup = (pathlib.Path(ROOT) / "serve" / "page" / "index.html").read_text(encoding="utf-8")
    assert "style=" not in markup and "<style" not in markup
