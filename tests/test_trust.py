"""The trust boundary: who may talk, what is read, which files."""

import asyncio
import contextlib
import json
import os
import time

import pytest
from livediffusion.trust import boundary, schema
from livediffusion.trust.schema import BadData, Limits, parsed

HERE = [
    # Origin, Host, X-Forwarded-Host: our own page, as browsers and proxies have it
    ("http://127.0.0.1:8188", "127.0.0.1:8188", None),
    ("http://LocalHost:8188", "localhost:8188", None),
    ("http://studio.lan", "studio.lan", None),
    ("http://studio.lan", "studio.lan:80", None),
    ("https://studio.lan", "studio.lan:443", None),
    ("https://studio.lan:443", "studio.lan", None),
    ("http://[::1]:8188", "[::1]:8188", None),
    ("http://[::1]:8188", "[0:0:0:0:0:0:0:1]:8188", None),
    ("https://[fe80::1]", "[fe80::1]:443", None),
    # nginx: Host $host, which loses the port
    ("http://studio.lan:8080", "studio.lan", None),
    ("http://[::1]:8080", "[::1]", None),
    # nginx's default Host, with X-Forwarded-Host $http_host or $host
    ("http://studio.lan:8080", "comfyui:8188", "studio.lan:8080"),
    ("https://studio.lan", "127.0.0.1:8188", "studio.lan"),
    ("https://studio.lan", "127.0.0.1:8188", "studio.lan:443, inner:80"),
    ("http://studio.lan:8080", "127.0.0.1:8188", "studio.lan"),
    (None, "127.0.0.1:8188", None),
    (None, "", None),
]
ELSEWHERE = [
    ("http://evil.example", "127.0.0.1:8188", None),
    ("http://evil.example", "studio.lan", None),
    ("http://evil.example", "127.0.0.1:8188", "studio.lan"),
    ("http://127.0.0.1:1", "127.0.0.1:8188", None),
    ("http://127.0.0.1", "127.0.0.1:8188", None),
    ("http://localhost:8188", "127.0.0.1:8188", None),
    ("https://studio.lan", "studio.lan:80", None),
    ("http://studio.lan:8188.evil.example", "studio.lan:8188", None),
    ("http://studio.lan@evil.example", "studio.lan", None),
    ("http://evil.example#studio.lan", "studio.lan", None),
    ("http://evil.example/studio.lan", "studio.lan", None),
    ("null", "127.0.0.1:8188", None),
    ("null", "null", None),
    ("file://studio.lan", "studio.lan", None),
    ("chrome-extension://studio.lan", "studio.lan", None),
    ("http://[::1", "[::1", None),
    ("http://[::1", "[::1]:8188", "[::1"),
    ("http://[::1", "", None),
    ("http://x:99999", "x:99999", None),
    ("http://", "", ""),
    ("", "", None),
    ("http://\u00e4", "\u00e4", None),
    ("\udcff", "\udcff", None),
    ("http://a b", "a b", None),
    ("http://" + "a" * 5000, "a" * 5000, None),
]


def headers(origin, host, forwarded, **more):
    given = {"Origin": origin, "Host": host, "X-Forwarded-Host": forwarded, **more}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("given", HERE, ids=str)
def test_our_own_page_may_talk(given):
    assert boundary.stranger(headers(*given)) is None
    own = headers(*given, **{"Sec-Fetch-Site": "same-origin"})
    assert boundary.stranger(own) is None
    for site in ("cross-site", "same-site"):
        assert boundary.stranger({**own, "Sec-Fetch-Site": site}) is not None


@pytest.mark.parametrize("given", ELSEWHERE, ids=str)
def test_another_sites_page_may_not(given):
    reason = boundary.stranger(headers(*given))
    assert reason and "proxy_set_header Host $http_host" in reason and len(reason) < 500
    reason.encode()


def test_an_origin_that_comfyui_lets_in_may_talk():
    foreign = headers("https://page.example", "127.0.0.1:8188", None)
    foreign["Sec-Fetch-Site"] = "cross-site"
    assert boundary.stranger(foreign, None) is not None
    assert boundary.stranger(foreign, "https://page.example") is None
    assert boundary.stranger(foreign, "*") is None
    assert boundary.stranger(foreign, "https://other.example") is not None


@pytest.mark.comfy
@pytest.mark.parametrize("forwarded", [False, True])
@pytest.mark.parametrize("sent", ["$http_host", "$host", "$host:$server_port", "inner:8188"])
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("name", ["studio.lan", "localhost", "127.0.0.1", "[::1]"])
@pytest.mark.parametrize("port", ["", ":8080"])
def test_where_comfyui_lets_a_page_through_so_do_we(
    comfyui, port, name, scheme, sent, forwarded, monkeypatch
):
    """Behind a proxy, ComfyUI's own check is the measure; where nobody tells the name, advice."""
    import server
    from aiohttp.test_utils import make_mocked_request

    loopback = ("localhost", "127.0.0.1", "::1")
    monkeypatch.setattr(server, "is_loopback", lambda host: host in loopback)
    asked, public = name + port, port or (":443" if scheme == "https" else ":80")
    host = {"$http_host": asked, "$host": name, "$host:$server_port": name + public}.get(sent, sent)
    given = headers(f"{scheme}://{asked}", host, asked if forwarded else None)

    async def handler(request):
        return None

    check = server.create_origin_only_middleware()
    answer = asyncio.run(check(make_mocked_request("POST", "/prompt", headers=given), handler))
    reason = boundary.stranger(given)
    if answer is None and (forwarded or sent != "inner:8188"):
        assert reason is None, given
    foreign = {**given, "Origin": "http://evil.example"}
    assert boundary.stranger(foreign) is not None


LIMITS = Limits(bytes=1000, depth=5, items=50)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "JSON is expected"),
        (b"\xff", "JSON is expected"),
        (b"{", "JSON is expected"),
        (b"[" * 40 + b"]" * 40, "nested"),
        (b"[1,[2,[3,[4,[5,[6]]]]]]", "nested"),
        (b"[NaN]", "not finite"),
        (b"[-Infinity]", "not finite"),
        (b"[1e999]", "not finite"),
        (b"1" + b"0" * 30, "too large"),
        (b'["\\ud800"]', "Unicode"),
        (b'{"\\udfff": 1}', "Unicode"),
        (b"[" + b"1," * 60 + b"1]", "more than 50 values"),
        (b'"' + b"x" * 1000 + b'"', "more than 1000"),
    ],
)
def test_json_has_bounds(text, says):
    with pytest.raises(BadData, match=f"^it: .*{says}"):
        parsed(text, "it", LIMITS)


def test_json_within_bounds_is_as_python_reads_it():
    value = {"a": [1, -2.5, None, True, "\u00e4"], "b": {"c": [[]]}, "": 2**64}
    assert parsed(json.dumps(value).encode(), "it", LIMITS) == value


@pytest.mark.parametrize("text", [
    b"[" * 10_000_000, b'{"a":' * 4_000_000, b"[" + b"[]," * 6_000_000 + b"[]]",
    b"1" * 20_000_000, b"[" * 499_999, b"[" + b"0," * 499_990 + b"0]",
    b'"' + b"\\u0041" * 3_000_000 + b'"', b"[" + b'"\xc3\xa4",' * 499_990 + b"1]",
], ids=lambda text: text[:8])  # fmt: skip
def test_a_hostile_text_is_soon_done_with(text):
    """Less of this process's own time than a second, at the size that a request may have."""
    began = time.process_time()
    with contextlib.suppress(BadData):
        parsed(text, "request", boundary.REQUEST)
    assert time.process_time() - began < 1


def test_schemas_say_where():
    check = schema.record({"a": schema.items(schema.whole(0, 5), 1, 3)}, {"b": schema.flag})
    assert check({"a": [1, 2]}, "x") == {"a": (1, 2)}
    for value, says in (
        ([], "x: an object"), ({}, "x: a is missing"), ({"a": 1}, "x.a: a list"),
        ({"a": []}, "x.a: 0 items"), ({"a": [1, 2, 3, 4]}, "x.a: 4 items"),
        ({"a": [1, 9]}, r"x.a\[1\]: 9 is not between"), ({"a": [1.5]}, r"x.a\[0\]: a whole number"),
        ({"a": [True]}, r"x.a\[0\]: a number"), ({"a": [1], "b": 1}, "x.b: true or false"),
        ({"a": [1], "c": 1}, "x: c is not known"),
    ):  # fmt: skip
        with pytest.raises(BadData, match=f"^{says}"):
            check(value, "x")


@pytest.mark.parametrize("name", ["a.mp4", "sub/a.mp4", "\u732b 12.30.mp4", "a b (1).gif", "..a"])
def test_names_that_lead_downwards(name):
    assert boundary.is_relative(name, windows=False) and boundary.is_relative(name, windows=True)


@pytest.mark.parametrize("name", [
    "", "..", "../a", "a/../b", "a\\..\\b", "/a", "\\a", "//h/s", "\\\\h\\s\\a", "\\\\?\\C:\\a",
    "C:a", "C:\\a", "c:/a", "a//b", "a/", "a\0b", "a\nb", "\ud800", "x" * 1025,
])  # fmt: skip
def test_names_that_may_lead_elsewhere(name):
    assert not boundary.is_relative(name, windows=False)
    assert not boundary.is_relative(name, windows=True)


def test_a_colon_is_a_stream_on_windows_only():
    assert boundary.is_relative("at 12:30.mp4", windows=False)
    for name in ("a.json:stream", "a.json::$DATA", "sub/a:b"):
        assert not boundary.is_relative(name, windows=True)


def test_contents_are_those_of_a_plain_file(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert boundary.contents(file, 5) == b"12345"
    with pytest.raises(BadData, match="a is larger than 4 bytes"):
        boundary.contents(file, 4)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "gone"):
        with pytest.raises(OSError):
            boundary.contents(path, 5)
