"""How an operator gets in, stays in, and gets in again on the twentieth day."""

import asyncio
import os
import re
import subprocess
import sys

import pytest
from serving import ROOT, served

access, tickets, main = served("access"), served("tickets"), served("main")
KEY, HOUR = b"k" * 32, 3600.0
START = 1_700_000_000.0


class House:
    """Tickets and the door, at a time that is set."""

    def __init__(self, secure=False, key=KEY):
        self.now = START
        self.tickets = tickets.Tickets(key, lambda: self.now)
        self.door = access.Door(self.tickets, secure, lambda: self.now)

    def address(self):
        return ticket_of(access.address(self.tickets, "http://house"))

    def signed_in(self, given):
        """The cookie of a browser that opened an address."""
        return held(self.door.cookie(self.door.opened(given, "")))

    def used(self, cookie, headers=()):
        """The headers of an answer to a browser with this cookie."""
        return asyncio.run(answered(self.door, cookie, headers))

    def kept(self, cookie):
        """The cookie that a browser has after a request."""
        found = [v for n, v in self.used(cookie) if n == b"set-cookie"]
        return held(found[-1].decode()) if found else cookie


async def answered(door, cookie, headers):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/relay/r1/",
             "headers": [(b"cookie", f"a=b; {access.COOKIE}={cookie}".encode())]}  # fmt: skip
    send = door.renewing(scope, send)
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
    await send({"type": "http.response.body", "body": b"x"})
    assert [message["type"][14:] for message in sent] == ["start", "body"]
    return sent[0]["headers"]


def ticket_of(address):
    return re.fullmatch(r"http://house/operator\?ticket=([\w.-]+)", address).group(1)


def held(header):
    return re.match(rf"{access.COOKIE}=([\w.-]+);", header).group(1)


def test_whoever_reads_what_a_house_printed_last_gets_in_on_any_day():
    house, printed, shown = House(), 0.0, []
    for half_hour in range(2 * 24 * 20):
        house.now = START + half_hour * HOUR / 2
        if access.due(printed, house.now):
            printed = house.now
            shown.append(house.address())
        assert house.door.opened(shown[-1], "")["id"] == "operator"
    assert len(shown) <= 2.2 * 20, "lines for who reads the log"
    # a clock that was set back by a year makes no house silent for a year
    assert access.due(printed, printed - 365 * 24 * HOUR)
    # and what was printed is no credential for ever
    for old in shown[:-2]:
        with pytest.raises(tickets.Refused, match="over"):
            house.door.opened(old, "")


def test_a_cookie_lasts_while_it_is_used_and_a_week_at_most():
    house = House()
    cookie = house.signed_in(house.address())
    lasted = 0
    while lasted < 24 * 20:
        lasted += 6
        house.now = START + lasted * HOUR
        try:
            house.door.opened(None, cookie)
        except tickets.Refused:
            break
        cookie = house.kept(cookie)
    assert lasted == access.SESSION_S / HOUR
    house.now = START
    unused = house.signed_in(house.address())
    house.now += 11.9 * HOUR
    house.door.opened(None, unused)
    house.now += HOUR
    with pytest.raises(tickets.Refused, match="over"):
        house.door.opened(None, unused)


def test_a_cookie_that_is_used_as_an_address_lasts_no_longer():
    house = House()
    cookie = house.signed_in(house.address())
    for _ in range(100):
        house.now += 6 * HOUR
        try:
            cookie = house.signed_in(cookie)
        except tickets.Refused:
            break
    assert house.now == START + access.SESSION_S


def test_a_browser_gets_a_cookie_when_it_is_due_and_no_proxy_keeps_it():
    house = House(secure=True)
    cookie = house.signed_in(house.address())
    before = [(b"Cache-Control", b"public, max-age=9"), (b"Set-Cookie", b"other=1")]
    assert house.used(cookie, before) == before, "one was just given"
    assert house.used("x", before) == before and house.used("", before) == before
    house.now += HOUR
    after = house.used(cookie, before)
    assert (b"Set-Cookie", b"other=1") in after and (b"cache-control", b"no-store") in after
    assert before[0] not in after
    made = next(v.decode() for n, v in after if n == b"set-cookie")
    parts = {*made.split("; ")[1:]}
    assert parts == {"Max-Age=43200", "Path=/", "HttpOnly", "SameSite=Strict", "Secure"}
    assert "Secure" not in House().door.cookie({"id": "operator"})
    # where an address is opened beside an old cookie, the address' own stays
    ours = [(b"set-cookie", f"{access.COOKIE}=new".encode())]
    assert house.used(cookie, ours) == ours


def test_an_old_bookmark_is_no_obstacle_to_who_is_in():
    house = House()
    old = house.address()
    house.now += 13 * HOUR
    cookie = house.signed_in(house.address())
    assert house.door.opened(old, cookie)["id"] == "operator"


def test_who_is_not_let_in_reads_why():
    house, other = House(), House(key=b"o" * 32)
    old = house.address()
    house.now += 13 * HOUR
    stream = house.tickets.make(tickets.STREAM, 9, id="v")
    for given, cookie, says in (
        (None, "", "run.py serve prints it"), ("", "", "run.py serve prints it"),
        (old, "", "is over"), (None, old, "is over"), (old, "x", "is over"),
        ("x", "", "no operator's address of this house"), (None, stream, "printed last"),
        (other.address(), "", "printed last"),
    ):  # fmt: skip
        with pytest.raises(tickets.Refused, match=says):
            house.door.opened(given, cookie)


def run(*arguments, key=None):
    env = {name: value for name, value in os.environ.items() if name != "LIVEDIFFUSION_KEY"}
    env |= {} if key is None else {"LIVEDIFFUSION_KEY": key}
    return subprocess.run(
        # without packages: it is run from a clone, beside a cluster
        [sys.executable, "-S", "run.py", "serve", "--operator", *arguments], cwd=ROOT, env=env,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.alone
def test_who_has_the_key_makes_an_address():
    key = "a" * 43
    done = run("https://art.example/", key=key)
    where, _, ticket = done.stdout.strip().partition("?ticket=")
    assert where == "https://art.example/operator" and done.returncode == 0, done.stderr
    said = tickets.Tickets(tickets.decoded(key)).read(ticket, tickets.OPERATOR)
    assert said["id"] == "operator"


@pytest.mark.parametrize("arguments,key,says", [
    ([], None, "LIVEDIFFUSION_KEY is not set"), ([], "", "LIVEDIFFUSION_KEY is not set"),
    ([], "abc", "16 bytes"), (["art.example"], "a" * 43, "https://"),
])  # fmt: skip
def test_who_has_none_reads_what_to_do(arguments, key, says, monkeypatch, capsys):
    monkeypatch.delenv("LIVEDIFFUSION_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("LIVEDIFFUSION_KEY", key)
    with pytest.raises(SystemExit):
        access.main(arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert says in said and "Traceback" not in said


def test_what_a_house_prints_later_opens_it_where_it_is_opened():
    house = House()
    for secure, where in ((False, "http://localhost:80"), (True, main.PROXY)):
        said = main.again("127.0.0.1", 80, secure, house.tickets)
        ticket = said.partition(f"{where}/operator?ticket=")[2]
        house.door.opened(ticket, "")
        assert "\n" not in said
        said = main.told("127.0.0.1", 80, secure, house.tickets)
        assert "12 hours" in said and "a new one is printed" in said
