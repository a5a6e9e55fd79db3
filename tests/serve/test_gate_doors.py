"""What a gate opens to whom: tickets, origins, addresses, and what somebody may hold up."""

import asyncio
import json
import time

import aiohttp
import pytest
from gating import ORIGIN, SECRET, House, gate, stream, until
from serving import served
from yarl import URL

doors = served("gate.doors")
pytestmark = pytest.mark.alone
COOKIE = "livediffusion_operator"


def run(test, **more):
    async def whole():
        async with House(**more) as house:
            await test(house)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(whole())


async def raw(house, text, seconds=5.0):
    """The status of a request as it is written, and all of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    try:
        writer.write(text if isinstance(text, bytes) else text.encode())
        said = await asyncio.wait_for(reader.read(), seconds)
    finally:
        writer.close()
    return int(said.split(b" ", 2)[1]) if said.startswith(b"HTTP/") else 0, said


def request(target, method="GET", headers="", body=b""):
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{headers}"
    if body:
        head += f"Content-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


START = json.dumps({"prompt": {"values": {}}}).encode()


def wrong_tickets(house):
    """Each kind of ticket that opens no stream here."""
    good = house.ticket()
    body, _, signature = good.partition(".")
    other = gate.tickets.Tickets(b"o" * 32)
    yield ""
    yield "x"
    yield body
    yield f"{body}."
    yield f".{signature}"
    yield f"{body}.{signature[:-1]}"
    yield f"{body[:-1]}.{signature}"
    yield good + "=" * 2
    yield good.swapcase()
    yield "9" * 5000
    yield house.ticket(seconds=-1)
    yield house.ticket(kind="visit")
    yield house.ticket(kind="operator")
    yield house.ticket(replica="r2")
    yield house.ticket(replica=None)
    yield house.ticket(id="")
    yield house.ticket(id=None)
    yield house.ticket(id=["v1"])
    yield house.ticket(id="x" * 65)
    yield house.ticket(id="v1\n")
    yield house.ticket(turn=[1])
    yield house.ticket(turn="1")
    yield house.ticket(until=time.time() - 1)
    yield other.make("stream", 60, id="v1", replica="r1", origin=ORIGIN, until=None, turn=1.0)


def _late(house, ticket):
    """Whether only a start looks at what is wrong: which turn it is of, and until when."""
    try:
        claims = house.tickets.read(ticket, "stream")
    except ValueError:
        return False
    mine = (claims["replica"], claims["id"]) == ("r1", "v1")
    return mine and (claims["turn"], claims["until"]) != (1.0, None)


def test_no_wrong_ticket_opens_anything():
    async def test(house):
        page = await house.page(turn=0.5)
        await until(lambda: house.comfyui.sockets)
        keys = "&".join(f"{name}={value}" for name, value in page.keys.items())
        before = len(house.comfyui.asked)
        for ticket in wrong_tickets(house):
            over = len(ticket) > 4000
            for method, path in (
                ("POST", "start"), ("POST", "update"), ("POST", "stop"), ("GET", "stats"),
                ("GET", "frames"), ("OPTIONS", "start"),
            ):  # fmt: skip
                if (method, path) != ("POST", "start") and _late(house, ticket):
                    continue
                target = f"/livediffusion/{path}?{keys}&ticket={ticket}"
                body = START if method == "POST" else b""
                status, said = await raw(house, request(target, method, body=body))
                assert status == 403 or (over and status == 400), (ticket, path, said)
                assert SECRET.encode() not in said
        assert len(house.comfyui.asked) == before
        await page.send()
        await until(lambda: page.pictures)

    run(test)


# as a browser, a program or somebody with a raw socket may write it
ADDRESSES = [
    "/", "/prompt", "/queue", "/history", "/ws", "/ws?clientId=x", "/view?filename=a.png",
    "/object_info", "/system_stats", "/userdata?dir=.", "/upload/image", "/interrupt", "/free",
    "/internal/logs", "/extensions", "/api/prompt", "/models", "/embeddings",
    "/livediffusion", "/livediffusion/", "/livediffusion/picture", "/livediffusion/snapshot",
    "/livediffusion/mjpeg/key", "/livediffusion/start/", "/livediffusion//start",
    "//livediffusion/start", "/livediffusion/./start", "/livediffusion/../prompt",
    "/livediffusion/start/../../prompt", "/livediffusion/%2e%2e/prompt",
    "/livediffusion%2fstart", "/livediffusion/%73tart", "/%2e%2e/%2e%2e/etc/passwd",
    "/../../etc/passwd", "/livediffusion/frames/../../ws", "/livediffusion/start;/prompt",
    "/livediffusion/start%00", "/livediffusion/start%0d%0aX:y", "/LIVEDIFFUSION/START",
    "/livediffusion\\start", "//127.0.0.1/prompt", "///prompt", "/relay/r1/livediffusion/start",
    "/livediffusion/start#/prompt", "/livediffusion/start%3f",
]  # fmt: skip


def test_a_visitors_ticket_opens_no_other_address():
    async def test(house):
        ticket = house.ticket()
        for address in ADDRESSES:
            mark = "&" if "?" in address else "?"
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
                target = f"{address}{mark}ticket={ticket}"
                status, said = await raw(house, request(target, method, body=b"{}"))
                assert status in (400, 403, 404, 405), (method, address, said)
                cookie = f"Cookie: {COOKIE}={ticket}\r\n"
                status, said = await raw(house, request(address, method, cookie, b"{}"))
                assert status in (400, 403, 404, 405), (method, address, said)
        for target in ("http://127.0.0.1/prompt", "http://example.com/", "*", "127.0.0.1:80"):
            for method in ("GET", "OPTIONS", "CONNECT"):
                status, _ = await raw(house, request(target, method))
                assert status in (400, 403, 405)
        assert house.comfyui.asked == []

    run(test)


@pytest.mark.parametrize("path", ["start", "update", "stop", "stats", "frames"])
def test_methods(path):
    async def test(house):
        ticket, right = house.ticket(), "GET" if path in ("stats", "frames") else "POST"
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"} - {right}:
            target = f"/livediffusion/{path}?ticket={ticket}"
            status, _ = await raw(house, request(target, method, body=START))
            assert status == 405, method
        # without a WebSocket, or without a session
        assert (await raw(house, request(f"/livediffusion/frames?ticket={ticket}")))[0] == 403
        assert house.comfyui.asked == []

    run(test)


def test_a_session_is_its_visitors():
    async def test(house):
        page = await house.page()
        keys = page.keys
        for data, ticket in (
            ({**keys, "token": "x" * 32}, page.ticket),
            ({**keys, "session": "x"}, page.ticket),
            ({**keys, "session": None}, page.ticket),
            ({**keys, "token": ["x"]}, page.ticket),
            ({}, page.ticket),
            ({"session": "comfy-session", "token": "comfy-token"}, page.ticket),
            (keys, house.ticket(id="v2")),
        ):
            for route in ("update", "stop"):
                whole = {**data, "prompt": {"values": {}}}
                assert (await house.post(route, whole, ticket))[0] == 403
            flat = {name: str(value) for name, value in data.items()}
            for route in ("stats", "frames"):
                url = f"{house.url}/livediffusion/{route}"
                async with house.http.get(url, params={**flat, "ticket": ticket}) as reply:
                    assert reply.status == 403
        assert page.closed is None

    run(test)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Origin": ORIGIN}, 200),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ORIGIN + ".evil.example"}, 403),
        ({"Origin": "https://house.example"}, 403),
        ({"Origin": ORIGIN + ":81"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": ORIGIN}, 200),
    ],
)
def test_other_sites_pages(headers, status):
    async def test(house):
        data = {"prompt": {"values": {}}}
        url = f"{house.url}/livediffusion/start"
        async with house.http.post(
            url, params={"ticket": house.ticket()}, json=data, headers=headers
        ) as reply:
            assert reply.status == status
            allowed = reply.headers.get("Access-Control-Allow-Origin")
            assert allowed == (ORIGIN if headers.get("Origin") == ORIGIN else None)
            assert "Access-Control-Allow-Credentials" not in reply.headers
            assert reply.headers["Referrer-Policy"] == "no-referrer"
        async with house.http.options(
            url, params={"ticket": house.ticket()}, headers=headers
        ) as reply:
            assert reply.status == (204 if status == 200 else 403)

    run(test)


def test_the_gates_own_page_may():
    async def test(house):
        own = {"Origin": house.url, "Host": f"127.0.0.1:{house.port}"}
        assert (await house.post("start", {"prompt": {"values": {}}}, headers=own))[0] == 200

    run(test)


def test_what_is_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(doors, "BEGIN_S", 0.4)
    monkeypatch.setattr(doors, "_LOOK_S", 0.1)

    async def test(house):
        start = f"/livediffusion/start?ticket={house.ticket()}"
        big = json.dumps({"prompt": {"values": {"3.text": "x" * 2**19}}}).encode()
        assert (await raw(house, request(start, "POST", body=big)))[0] == 413
        deep = b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}"
        assert (await raw(house, request(start, "POST", body=deep)))[0] == 400
        many = b'{"prompt":{"values":{}},"x":[' + b"1," * 9000 + b"1]}"
        assert (await raw(house, request(start, "POST", body=many)))[0] == 400
        packed = request(start, "POST", "Content-Encoding: gzip\r\n", START)
        assert (await raw(house, packed))[0] == 400
        assert (await raw(house, request("/" + "x" * 20_000)))[0] == 400
        assert (await raw(house, request("/", headers="A: " + "x" * 40_000 + "\r\n")))[0] == 400
        assert (await raw(house, request("/", headers="A: b\r\n" * 500)))[0] == 400
        assert (await raw(house, b"\x16\x03\x01" + bytes(200)))[0] == 400
        # a head, and a body, that never come to their end
        began = time.monotonic()
        slow = request(start, "POST", f"Content-Length: {len(START)}\r\n")
        assert (await raw(house, slow))[0] == 408
        assert await raw(house, b"GET / HTTP/1.1\r\nHost: x\r\n") == (0, b"")
        assert await raw(house, b"") == (0, b"")
        assert time.monotonic() - began < 4
        assert house.comfyui.asked == []
        page = await house.page()
        await page.send()
        await until(lambda: page.pictures)

    run(test)


def test_who_only_holds_connections_is_pushed_out(monkeypatch):
    monkeypatch.setattr(doors, "MOST_OPEN", 8)

    async def test(house):
        page = await house.page()
        holding = [await asyncio.open_connection("127.0.0.1", house.port) for _ in range(30)]
        assert (await house.post("update", {**page.keys, "prompt": {"values": {}}}))[0] == 200
        gone = [one for one, _ in holding if await _ended(one)]
        assert len(gone) >= 20
        await page.send()
        await until(lambda: page.pictures)
        for _, writer in holding:
            writer.close()

    run(test)


async def _ended(reader):
    try:
        return await asyncio.wait_for(reader.read(1), 0.02) == b""
    except asyncio.TimeoutError:
        return False
    except ConnectionError:
        return True


# -- the operator ----------------------------------------------------------------------------


def test_a_page_hears_something_while_comfyui_says_nothing(monkeypatch):
    """Or it would take the connection to be dead: a ComfyUI that begins anew is silent for long."""
    monkeypatch.setattr(stream, "_TOLD_S", 0.1)

    async def test(house):
        page = await house.page()
        await until(lambda: len(page.heard("alive")) >= 3)
        await page.send()
        await until(lambda: page.pictures)

    run(test)


def operator(house):
    return house.tickets.make("operator", 60, id="op")


def cookie(house):
    return {"Cookie": f"{COOKIE}={operator(house)}; other=1"}


def test_an_operators_ticket_becomes_a_cookie():
    async def test(house):
        for path, there in (
            ("/", "/"), ("/queue", "/queue"), ("/a?b=c%20d&ticket=", None),
            ("//evil.example/x", "/evil.example/x"), ("/\\evil.example", None),
            ("/view?filename=a%2fb&type=input", "/view?filename=a%2fb&type=input"),
        ):  # fmt: skip
            mark = "&" if "?" in path else "?"
            target = URL(f"{house.url}{path}{mark}ticket={operator(house)}", encoded=True)
            async with house.http.get(target, allow_redirects=False) as reply:
                if path.endswith("ticket="):
                    assert reply.status == 403
                    continue
                assert reply.status == 303
                place = reply.headers["Location"]
                assert "ticket" not in place and place[0] == "/" and place[1:2] not in ("/", "\\")
                assert there is None or place == there
                set_cookie = reply.headers["Set-Cookie"]
                assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {*set_cookie.split("; ")}
        assert house.comfyui.asked == []

    run(test)


def test_an_operator_reaches_comfyui_and_comfyui_not_the_ticket():
    async def test(house):
        for method in ("GET", "POST", "PUT", "DELETE"):
            data = b"body" if method != "GET" else None
            async with house.http.request(
                method, f"{house.url}/any/thing?a=1&b=%20", headers=cookie(house), data=data
            ) as reply:
                assert (reply.status, await reply.text()) == (200, SECRET)
                assert reply.headers["X-Of"] == "ComfyUI"
        # the pack's own routes, from ComfyUI's page
        async with house.http.get(f"{house.url}/livediffusion/stats", headers=cookie(house)) as r:
            assert (await r.json())["state"] == "live"
        headers = {**cookie(house), "Origin": house.url}
        async with house.http.ws_connect(f"{house.url}/ws?clientId=x", headers=headers) as socket:
            await socket.send_str("hello")
            assert (await socket.receive()).data == "echo hello"
        ticket = operator(house)
        assert all(ticket not in json.dumps(one) for one in house.comfyui.headers)
        assert all("ticket" not in path for _, path in house.comfyui.asked)
        assert house.comfyui.headers[0]["Cookie"] == "other=1"
        # nor takes who asks by this way for somebody at the server (docs/sources.md, Allow)
        for headers in house.comfyui.headers:
            assert not gate.boundary.at_server(headers, "127.0.0.1")
            theirs = {name: value for name, value in headers.items() if name != "Via"}
            assert gate.boundary.at_server(theirs, "127.0.0.1")
        assert house.comfyui.asked[0] == ("GET", "/any/thing?a=1&b=%20")
        await house.comfyui.die()
        async with house.http.get(f"{house.url}/queue", headers=cookie(house)) as reply:
            assert reply.status == 502

    run(test)


@pytest.mark.parametrize("code, told", [(1000, 1000), (4409, 4409), (4410, 4410), (1011, 1001)])
def test_an_operators_page_hears_how_its_socket_ended(code, told):
    """1000 would be the last word: its Live run would not come back."""

    async def test(house):
        url = f"{house.url}/livediffusion/else"
        async with house.http.ws_connect(url, headers=cookie(house)) as socket:
            await socket.send_str(str(code))
            await socket.receive()
            assert socket.close_code == told

    run(test)


NAVIGATE = {"Sec-Fetch-Mode": "navigate"}
# what another site's page may lead to: ComfyUI's page. Any other path may do something
LED = [("/", True), ("/?template=live_webcam&source=x", True)] + [(path, False) for path in (
    "/queue", "/interrupt", "/api/interrupt", "/livediffusion/stats", "/some_pack/does?now=1",
    "/index.html", "//", "//?a", "/.", "/%2f", "/./", "/x/..", "/\\",
)]  # fmt: skip


@pytest.mark.parametrize(
    "headers, method, path, status",
    [
        ({"Origin": "http://evil.example"}, "POST", "/queue", 403),
        ({"Origin": "null"}, "POST", "/queue", 403),
        ({"Sec-Fetch-Site": "cross-site"}, "GET", "/queue", 403),
        ({"Sec-Fetch-Site": "same-site"}, "GET", "/queue", 403),
        ({"Sec-Fetch-Site": "same-site"}, "GET", "/", 403),
        ({"Sec-Fetch-Site": "same-site", **NAVIGATE}, "POST", "/", 403),
        ({"Sec-Fetch-Site": "same-origin"}, "GET", "/queue", 200),
        ({"Sec-Fetch-Site": "same-origin", **NAVIGATE}, "GET", "/queue", 200),
        ({"Sec-Fetch-Site": "none", **NAVIGATE}, "GET", "/queue", 200),
        *(({"Sec-Fetch-Site": site, **NAVIGATE}, "GET", path, 200 if led else 403)
          for path, led in LED for site in ("same-site", "cross-site")),
    ],
)  # fmt: skip
def test_an_operators_cookie_is_not_another_pages(headers, method, path, status):
    async def test(house):
        more = {**cookie(house), **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        assert (await raw(house, request(path, method, lines)))[0] == status
        upgrade = {**cookie(house), "Origin": "http://evil.example"}
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await house.http.ws_connect(f"{house.url}/ws", headers=upgrade)
        assert len(house.comfyui.asked) == (status == 200)

    run(test)


@pytest.mark.parametrize("path, led", LED)
def test_a_link_from_elsewhere_comes_again_with_its_cookie(path, led):
    """To ComfyUI's page; from there it would be this house's own page that asks for the rest."""

    async def test(house):
        come = "Sec-Fetch-Site: cross-site\r\n"
        status, said = await raw(house, request(path, "GET", f"{come}Sec-Fetch-Mode: navigate\r\n"))
        assert (status, b'content="0;url=/' in said) == ((200, True) if led else (403, False))
        for headers in (f"{come}Sec-Fetch-Mode: cors\r\n", "", "Sec-Fetch-Site: same-origin\r\n"):
            assert (await raw(house, request(path, "GET", headers)))[0] == 403
        assert house.comfyui.asked == []

    run(test)


def test_an_address_that_comes_again_is_no_html_of_its_own():
    async def test(house):
        come = {"Sec-Fetch-Site": "cross-site", **NAVIGATE}
        url = URL(f'{house.url}/?a"><script>&b=<c>', encoded=True)
        async with house.http.get(url, headers=come) as reply:
            text = await reply.text()
            assert (reply.status, "<script>" in text, "url=/?a" in text) == (200, False, True)

    run(test)


@pytest.mark.parametrize("make", [
    lambda house: "", lambda house: "x", lambda house: house.ticket(),
    lambda house: house.ticket(kind="visit"), lambda house: operator(house)[:-2],
    lambda house: house.tickets.make("operator", -1, id="op"),
    lambda house: gate.tickets.Tickets(b"o" * 32).make("operator", 60, id="op"),
])  # fmt: skip
def test_nobody_else_is_an_operator(make):
    async def test(house):
        ticket = make(house)
        for address in ("/", "/prompt", "/ws", "/livediffusion/start", "/view?filename=x"):
            for method in ("GET", "POST"):
                headers = f"Cookie: {COOKIE}={ticket}\r\n"
                status, _ = await raw(house, request(address, method, headers, b"{}"))
                assert status == 403
                mark = "&" if "?" in address else "?"
                if address != "/livediffusion/start":
                    target = f"{address}{mark}ticket={ticket}"
                    assert (await raw(house, request(target, method, body=b"{}")))[0] == 403
        assert house.comfyui.asked == []

    run(test)
