"""What an offer of a stranger may say, and where packets may go for it."""

import pytest
from livediffusion.trust import offers
from livediffusion.trust.schema import BadData

BASE = [
    "v=0", "o=- 1 1 IN IP4 0.0.0.0", "s=-", "t=0 0", "m=video 9 UDP/TLS/RTP/SAVPF 96 97",
    "c=IN IP4 0.0.0.0", "a=mid:0", "a=ice-ufrag:abcd", "a=ice-pwd:abcdefghijklmnopqrstuv",
]  # fmt: skip
PEER = "192.168.1.20"


def sdp(*more, base=BASE):
    return ("\r\n".join([*base, *more]) + "\r\n").encode()


def candidate(host, port=50000, transport="udp", component=1, kind="host"):
    return f"a=candidate:1 {component} {transport} 2122260223 {host} {port} typ {kind}"


def tried(*lines, peer=PEER):
    """Host and port of each candidate that is left of an offer."""
    text = offers.offer(sdp(*lines), peer)
    found = [line.split() for line in text.splitlines() if line.startswith("a=candidate")]
    return [(one[4], int(one[5])) for one in found]


ELSEWHERE = [
    "192.168.1.21", "10.0.0.1", "127.0.0.1", "::1", "0.0.0.0", "169.254.169.254", "8.8.8.8",
    "224.0.0.251", "255.255.255.255", "fd00::1", "fe80::1", "::ffff:10.0.0.1", "3232235796",
    "0xc0a80114", "0300.0250.01.024", "192.168.276", "metadata.google.internal", "localhost",
    "example.com", "192.168.1.20.nip.io", "%2e", "192.168.1.20 ", "",
]  # fmt: skip


@pytest.mark.parametrize("host", ELSEWHERE)
def test_a_candidate_at_another_host_is_never_tried(host):
    assert (
        tried(candidate(host), candidate(host, kind="srflx"), candidate(host, kind="relay")) == []
    )


@pytest.mark.parametrize("host", [PEER, f"::ffff:{PEER}", "5d1f0cd1-9a3b.local", "A.LOCAL"])
def test_only_the_address_that_asked_is_tried(host):
    """Browsers hide it behind a name that is never looked up."""
    assert tried(candidate(host)) == [(PEER, 50000)]


@pytest.mark.parametrize(
    "line",
    [
        candidate(PEER, 53), candidate(PEER, 1023), candidate(PEER, 0), candidate(PEER, 70000),
        candidate(PEER, transport="tcp"), candidate(PEER, component=2), "a=candidate:",
        "a=candidate:1 1 udp 1 192.168.1.20 50000", candidate(PEER).replace("2122260223", "x"),
        candidate(PEER, "9" * 30), "a=candidate:" + "1" * 65 + candidate(PEER)[13:],
        "a=remote-candidates:1 192.168.1.20 50000",
    ],
)  # fmt: skip
def test_a_candidate_that_cannot_be_is_left_out(line):
    assert tried(line) == []


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "", "unix", "0.0.0.0"])
def test_this_machine_itself_is_never_tried(peer):
    assert tried(candidate("127.0.0.1"), candidate("::1"), candidate("x.local"), peer=peer) == []


def test_thousands_of_candidates_are_a_few():
    lines = [candidate(PEER, 20000 + i % 40000) for i in range(400)]
    assert len(set(tried(*lines))) == len(tried(*lines)) == offers.MOST_CANDIDATES
    with pytest.raises(BadData, match="too many"):
        offers.offer(sdp(*["a=candidate:"] * 3000), PEER)
    with pytest.raises(BadData, match="larger"):
        offers.offer(sdp(*lines * 40), PEER)


def test_no_word_of_a_candidate_is_passed_on():
    text = offers.offer(sdp(candidate(PEER) + " raddr 10.0.0.1 rport 9 secret x"), PEER)
    assert "10.0.0.1" not in text and "secret" not in text


def test_a_second_track_gets_the_same_and_the_end_of_candidates_is_kept_open():
    more = [line.replace("mid:0", "mid:1") for line in BASE[4:]]
    text = offers.offer(sdp(candidate(PEER), *more, "a=end-of-candidates"), PEER)
    assert text.count("a=candidate:1 1 udp") == 2 and "end-of-candidates" not in text


def without(start):
    return [line for line in BASE if not line.startswith(start)]


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "no session"),
        (b"\xff\xfe", "UTF-8"),
        (b"v=0\r\n", "tracks"),
        (sdp(base=without("v=")), "no session"),
        (sdp(base=without("m=")), "tracks"),
        (sdp(base=without("a=ice-ufrag")), "ice-ufrag"),
        (sdp(base=without("a=ice-pwd")), "ice-pwd"),
        (sdp("a=ice-ufrag:x"), "ice-ufrag"),
        (sdp("a=ice-pwd:short"), "ice-pwd"),
        (sdp("m=application 9 UDP/DTLS/SCTP webrtc-datachannel"), "tracks"),
        (sdp("m=video 9 RTP/AVP 96"), "tracks"),
        (sdp(*["m=audio 9 UDP/TLS/RTP/SAVPF 0"] * 9), "tracks"),
        (sdp("m=video 9 UDP/TLS/RTP/SAVPF " + " ".join(["96"] * 200)), "tracks"),
        (sdp("a=x\x00y"), "control"),
        (sdp("a=x:" + "y" * 3000), "too long"),
        (sdp(base=[line.replace("m=video", "m=audio") for line in BASE]), "no video"),
    ],
)
def test_what_is_no_offer_of_pictures_is_refused(data, why):
    with pytest.raises(BadData, match=why):
        offers.offer(data, PEER)


def test_candidates_that_come_later_are_looked_at_as_well():
    said = ["a=ice-ufrag:abcd", "m=video 9 UDP/TLS/RTP/SAVPF 96", candidate("10.0.0.1"),
            candidate(PEER, 40000), "a=end-of-candidates"]  # fmt: skip
    ufrag, left = offers.fragment("\r\n".join(said).encode(), PEER)
    assert ufrag == "abcd" and left == [f"candidate:1 1 udp 2122260223 {PEER} 40000 typ host"]
    assert offers.ufrags(offers.offer(sdp(), PEER)) == {"abcd"}


@pytest.mark.parametrize(
    "peer, host, there",
    [
        ("93.184.216.34", "93.184.216.34", True), ("93.184.216.34", "1.1.1.1", True),
        ("93.184.216.34", "10.0.0.1", False), ("93.184.216.34", "169.254.169.254", False),
        ("93.184.216.34", "127.0.0.1", False), ("93.184.216.34", "x.local", False),
        ("93.184.216.34", "example.com", False), ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.7", "10.0.0.8", False), ("10.0.0.7", "1.1.1.1", False),
        ("127.0.0.1", "127.0.0.1", True), ("127.0.0.1", "203.0.113.9", False),
        ("127.0.0.1", "127.0.0.5", True), ("127.0.0.1", "0.0.0.0", False),
        ("169.254.169.254", "169.254.169.254", False), ("0.0.0.0", "0.0.0.0", False),
    ],
)  # fmt: skip
def test_an_answer_leads_to_who_gave_it_or_from_one_public_place_to_another(peer, host, there):
    text = offers.answer(sdp(candidate(host)), peer)
    assert (f" {host} 50000 typ host" in text) is there
