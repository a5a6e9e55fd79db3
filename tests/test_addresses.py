"""Addresses: how they are read, what a pattern allows, and where none leads, whatever allows it."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livediffusion.trust import addresses
from livediffusion.trust.addresses import as_pattern, is_loopback, never, parsed, pattern
from livediffusion.trust.schema import BadData

FITS = [
    ("rtsp://cam.local/stream", "rtsp://cam.local/stream"),
    ("rtsp://cam.local/stream", "rtsp://me:word@CAM.local:554/stream"),
    ("rtsp://cam.local", "rtsp://cam.local/any/thing?at=all"),
    ("rtsp://cam.local:*", "rtsp://cam.local:8554/x"),
    ("rtsp://[10.0.0.0/24]:*/live/*", "rtsp://10.0.0.77:8554/live/one"),
    ("srt://*.studio.example:9000", "srt://a.studio.example:9000?streamid=x"),
    ("http://cam/video?channel=*", "http://cam/video?channel=3"),
    ("http://127.0.0.1:*/*", "http://127.0.0.1:8080/film"),
    ("http://localhost:*", "http://localhost:8080/film"),
    ("http://[fd00::/8]:*", "http://[fd00::5]/film"),
    ("http://[::1]", "http://[::1]/film"),
]
FITS_NOT = [
    ("rtsp://cam.local/stream", "rtsp://cam.local/stream2"),
    ("rtsp://cam.local/stream", "rtsp://cam.local/stream?user=1"),
    ("rtsp://cam.local/stream", "rtsp://cam.local:8554/stream"),
    ("rtsp://cam.local", "rtsps://cam.local"),
    ("rtsp://cam.local:*", "rtsp://cam.local.evil.example/"),
    ("rtsp://[10.0.0.0/24]:*", "rtsp://10.0.1.5/"),
    ("rtsp://[10.0.0.0/24]:*", "rtsp://host/"),
    ("srt://*.studio.example:9000", "srt://studio.example.evil:9000"),
    ("http://*", "http://127.0.0.1/"),
    ("http://*", "http://localhost/"),
    ("http://[127.0.0.0/8]:*", "http://127.0.0.1/"),
    ("http://127.0.0.1:*", "http://localhost/"),
    ("http://*", "http://[::ffff:127.0.0.1]/"),
    ("http://cam/live*", "http://cam/other"),
    ("http://cam.local/", "http://camxlocal/"),
]
NO_ADDRESS = [
    "", " ", "cam.local", "file:///etc/passwd", "FILE:///etc/passwd", "concat:a|b", "data:,x",
    "subfile,,start,0,end,9,,:/etc/passwd", "pipe:0", "crypto+http://host/", "ftp://host/x",
    "gopher://host/", "unix:/tmp/x", "tcp://host:1", "udp://host:1", "rtp://host:1", "fd:3",
    "cache:http://host/", "async:http://host/", "hls+http://host/", "ffrtmphttp://host/",
    "rtmpt://host/", "mmsh://host/", "ipfs://host/", "tls://host:1", "httpproxy://host/",
    r"\\server\share", "//server/share", "C:/film.mp4", "/etc/passwd", "http:/host/",
    "http:host", "http://", "http:///x", "http://host:0/", "http://host:65536/", "http://host:x/",
    "http://a b/", "http://host\n/", "http://host\x00/", "http://host\t/", "http://h\u00f6st/",
    "http://u@v@host/", "http://host\\@other/", "http://host#@other/" "\\", "http://[::1/",
    "http://[fe80::1%25eth0]/", "http://[::1]x/", "http://1/", "http://2130706433/",
    "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/", "http://1.2.3.4.5/",
    "http://256.0.0.1/", "http://-a/", "http://a..b/", "http://host/../x", "http://host/%2e%2e/x",
    "http://host/.%2E/x", "http://host/./x", "srt://host", "http://host/*", "http://%31/",
    "http://" + "a" * 1100,
]  # fmt: skip


@pytest.mark.parametrize("allows, address", FITS)
def test_a_pattern_allows_what_it_says(allows, address):
    assert pattern(allows).fits(parsed(address))


@pytest.mark.parametrize("allows, address", FITS_NOT)
def test_a_pattern_allows_nothing_else(allows, address):
    assert not pattern(allows).fits(parsed(address))


@pytest.mark.parametrize("text", NO_ADDRESS, ids=range(len(NO_ADDRESS)))
def test_what_is_no_address_is_refused_in_words(text):
    with pytest.raises(BadData, match=r"^address: [\x20-\x7e]+$"):
        parsed(text)


@pytest.mark.parametrize("text", [
    "http://user:word@host/x", "cam.local", "rtsp://[10.0.0.0/33]", "rtsp://[1.2.3]", "*",
    "*://host", "file://x", "http://host:99999999", "http://", "http://h h/", "",
])  # fmt: skip
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(BadData):
        pattern(text)


@given(
    st.sampled_from(["rtsp", "http", "srt"]),
    st.from_regex(r"[a-z]{1,9}(\.[a-z]{1,9})?", fullmatch=True), st.integers(1, 65535),
    st.from_regex(r"(/[a-z0-9{}]{1,5}){0,3}", fullmatch=True),
    st.from_regex(r"([a-z]=[a-z0-9]{1,4})?", fullmatch=True),
)  # fmt: skip
def test_its_own_pattern_allows_an_address_as_it_was_read(scheme, host, port, path, query):
    text = f"{scheme}://me:word@{host}:{port}{path}" + (f"?{query}" if query else "")
    address = parsed(text)
    assert parsed(address.text()) == address
    assert "word" not in as_pattern(address) and pattern(as_pattern(address)).fits(address)


def test_the_pattern_of_an_address_allows_no_other_path():
    address = parsed("rtsp://10.0.0.5/24")
    made = pattern(as_pattern(address))
    assert made.fits(address) and not made.fits(parsed("rtsp://10.0.0.6/24"))
    assert not made.fits(parsed("rtsp://10.0.0.5/"))


@pytest.mark.parametrize("ip", [
    "169.254.169.254", "169.254.0.1", "fd00:ec2::254", "100.100.100.200", "168.63.129.16",
    "192.0.0.192", "fd20:ce::254", "fe80::1", "::ffff:169.254.169.254", "::169.254.169.254",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2002:a9fe:a9fe::", "2002:a9fe:a9fe::1",
    "2001:0:a9fe:a9fe::", "fd00::5efe:a9fe:a9fe", "::ffff:0:a9fe:a9fe", "0.0.0.0", "0.1.2.3", "::",
    "::ffff:0.0.0.0", "224.0.0.1", "239.1.2.3", "ff02::1", "255.255.255.255", "240.0.0.1",
    "::ffff:224.0.0.1",
])  # fmt: skip
def test_where_nothing_leads_whatever_is_allowed(ip):
    assert never(ipaddress.ip_address(ip))


@pytest.mark.parametrize("ip", ["10.0.0.5", "192.168.1.2", "172.16.0.1", "8.8.8.8", "fd12::5",
                                "2606:4700::1111", "127.0.0.1", "::1"])  # fmt: skip
def test_where_something_may_lead(ip):
    assert never(ipaddress.ip_address(ip)) is None


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1",
                                "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"])  # fmt: skip
def test_this_machine_is_known_in_every_spelling(ip):
    assert is_loopback(ipaddress.ip_address(ip))


def test_a_name_of_which_one_address_is_forbidden_is_not_opened_at_all():
    address = parsed("http://both.example/")
    with pytest.raises(BadData, match=r"169\.254\.169\.254"):
        addresses.reachable(address, ["10.0.0.5", "169.254.169.254"])
    with pytest.raises(BadData, match="this machine"):
        addresses.reachable(address, ["10.0.0.5", "127.0.0.1"])
    with pytest.raises(BadData, match="nowhere"):
        addresses.reachable(address, [])
    found = addresses.reachable(parsed("http://localhost/"), ["::1", "127.0.0.1", "127.0.0.1"])
    assert [str(ip) for ip in found] == ["::1", "127.0.0.1"]
