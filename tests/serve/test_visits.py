"""What a page may say to the house, and what it hears."""

import contextlib
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import served

visits, tickets = served("ingress.visits"), served("tickets")
KEY = b"k" * 32


class Front:
    """An ingress without sockets."""

    def __init__(self, most=100):
        self.now = 1000.0
        self.tickets = tickets.Tickets(KEY, lambda: self.now)
        self.visits = visits.Visits(
            self.tickets, "", 15.0, 60.0, True, most, clock=lambda: self.now
        )

    def page(self, *said, **more):
        heard = []
        visit = visits.Visit(
            heard.append, lambda code, why: heard.append({"type": "closed", "code": code}),
            "http://house", **more,
        )  # fmt: skip
        visit.heard = heard
        self.visits.opened(visit)
        for one in said:
            self.say(visit, one)
        return visit

    def say(self, visit, message):
        self.visits.heard(visit, json.dumps(message).encode())

    def lobby(self, house=None, **states):
        here, _ = self.visits.entries()
        asked = {entry[0]: entry[1] for entry in here}
        self.visits.apply({
            "visitors": {v: states.get("all") or states[v] for v in asked},
            "replicas": {"r1": ("10.0.0.1:8301", "http://10.0.0.1:8301"), "r2": ("b:1", None)},
            "house": house,
        }, asked)  # fmt: skip
        return here


HELLO, WANT = {"type": "hello"}, {"type": "want"}


def of(visit, kind):
    return [message for message in visit.heard if message["type"] == kind]


def test_a_page_is_welcome_waits_and_goes():
    front = Front()
    page = front.page(HELLO, WANT)
    assert [message["type"] for message in page.heard] == ["welcome", "ticket"]
    for place in (3, 3, 2):
        front.lobby(all=("wait", place, 3, 9.6, False, None))
    places = [(m["place"], m["of"], m["wait_s"]) for m in of(page, "place")]
    assert places == [(3, 3, 10), (2, 3, 10)]
    front.lobby(all=("go", "r1", front.now + 60, False))
    front.lobby(all=("go", "r1", front.now + 60, False))
    (go,) = of(page, "go")
    assert go["direct"] == "http://10.0.0.1:8301" and go["relay"] == "/relay/r1"
    assert go["left_s"] == 60 and go["moved"] is False
    claims = front.tickets.read(go["ticket"], tickets.STREAM)
    assert claims["id"] == page.id and claims["replica"] == "r1"
    assert claims["origin"] == "http://house" and claims["until"] == front.now + 60
    assert claims["turn"] == page.since


def test_a_page_that_comes_back_has_its_place_and_its_stream():
    front = Front()
    page = front.page(HELLO, WANT)
    front.lobby(all=("go", "r1", 2000.0, False))
    held = of(page, "ticket")[-1]["ticket"]
    front.visits.closed(page)
    front.now += 20
    elsewhere = Front()  # another ingress, or the same after a crash
    elsewhere.now = front.now
    again = elsewhere.page({**HELLO, "ticket": held})
    ((visitor, since, operator, had, until, missed),) = elsewhere.lobby(
        all=("go", "r1", 2000.0, False)
    )
    assert (visitor, since, had, until) == (page.id, 1000.0, "r1", 2000.0)
    assert not operator and missed is None
    assert len(of(again, "go")) == 1


@pytest.mark.parametrize("after,same", [(60, True), (120, True), (151, False), (9999, False)])
@pytest.mark.parametrize("waits", [0, 29, 31])
def test_a_place_is_kept_for_two_minutes(after, same, waits):
    """However long ago its page got its last ticket. With the lobby: test_places.py."""
    front = Front()
    page = front.page(HELLO, WANT)
    for _ in range(waits):
        front.now += 1
        front.visits.tick()
    held = of(page, "ticket")[-1]["ticket"]
    front.visits.closed(page)
    front.now += after
    again = front.page({**HELLO, "ticket": held})
    assert (again.id == page.id) is same and (again.since is not None) is same


@pytest.mark.parametrize("kind", [tickets.STREAM, tickets.OPERATOR])
def test_a_ticket_of_another_kind_is_no_visit(kind):
    front = Front()
    held = front.tickets.make(kind, 60, id="somebody", since=1.0, operator=True)
    page = front.page({**HELLO, "ticket": held})
    assert page.id != "somebody" and page.since is None and not page.operator


def test_two_sockets_of_one_visitor_are_one_visit():
    front = Front()
    page = front.page(HELLO, WANT)
    held = of(page, "ticket")[-1]["ticket"]
    newer = front.page({**HELLO, "ticket": held})
    assert of(page, "over")[-1]["reason"] == "elsewhere" and of(page, "closed")
    front.visits.closed(page)
    assert [entry[0] for entry in front.visits.entries()[0]] == [newer.id]


def test_tickets_are_renewed_while_a_page_is_there():
    front = Front()
    page = front.page(HELLO, WANT)
    front.lobby(all=("go", "r1", None, False))
    before = len(of(page, "ticket"))
    for _ in range(200):
        front.now += 1
        front.visits.tick()
    renewed = of(page, "ticket")[before:]
    assert 5 <= len(renewed) <= 7
    last = renewed[-1]
    assert front.tickets.read(last["stream"], tickets.STREAM)["replica"] == "r1"
    assert front.tickets.read(last["ticket"], tickets.VISIT)["since"] == 1000.0


def test_every_page_hears_something_regularly():
    """Or it takes its connection to be gone; see SILENT in serve/page/house.mjs."""
    front = Front()
    pages = {"idle": front.page(HELLO)}
    states = {"waits": ("wait", 2, 2, None, False, None), "runs": ("go", "r1", None, False),
              "over": ("over", "time")}  # fmt: skip
    for name in states:
        pages[name] = front.page(HELLO, WANT)
    ids = {pages[name].id: state for name, state in states.items()}
    front.lobby(**ids)
    said = {name: [] for name in pages}
    for second in range(200):
        front.now += 1
        before = {name: len(page.heard) for name, page in pages.items()}
        front.visits.tick()
        for name, page in pages.items():
            said[name] += [second] if len(page.heard) > before[name] else []
    for name, times in said.items():
        gaps = [b - a for a, b in zip([0, *times], [*times, 200])]  # noqa: B905
        assert max(gaps) <= visits.RENEWED + 1, name


def test_a_page_on_https_is_not_sent_to_a_port_that_speaks_none():
    front = Front()
    page = front.page(HELLO, WANT, secure=True)
    front.lobby(all=("go", "r1", None, False))
    assert of(page, "go")[0]["direct"] is None


def test_moving_is_told_before_the_next_place():
    front = Front()
    page = front.page(HELLO, WANT)
    front.lobby(all=("go", "r1", None, False))
    front.lobby(all=("wait", 1, 1, None, True, "draining"))
    front.lobby(all=("go", "r2", None, True))
    kinds = [m["type"] for m in page.heard if m["type"] != "ticket"]
    assert kinds == ["welcome", "go", "moving", "place", "go"]
    assert page.had == "r2"


@pytest.mark.parametrize("state,reason", [
    (("over", "time"), "time"), (("over", "gone"), "gone"), (("full",), "full"),
])  # fmt: skip
def test_over_is_told_once_and_the_page_may_want_again(state, reason):
    front = Front()
    page = front.page(HELLO, WANT)
    front.lobby(all=state)
    front.lobby()
    assert [m["reason"] for m in of(page, "over")] == [reason]
    assert page.since is None
    front.now += 5
    front.say(page, WANT)
    assert front.visits.entries()[0][0][1] == front.now


def test_an_answer_about_the_turn_before_is_not_for_this_one():
    front = Front()
    page = front.page(HELLO, WANT)
    here, _ = front.visits.entries()
    front.say(page, {"type": "leave"})
    front.now += 1
    front.say(page, WANT)
    front.visits.apply({"visitors": {page.id: ("over", "left")}, "replicas": {}, "house": None},
                       {here[0][0]: here[0][1]})  # fmt: skip
    assert page.since == front.now


def test_leaves_are_said_three_times_of_the_turn_that_was_left():
    front = Front()
    page, other = front.page(HELLO, WANT), front.page(HELLO, WANT)
    front.say(page, {"type": "leave"})
    front.say(other, {"type": "leave"})
    left = [(page.id, front.now), (other.id, front.now)]
    assert front.visits.entries()[1] == left
    front.now += 1
    front.say(other, WANT)  # another turn
    said = [front.visits.entries()[1] for _ in range(4)]
    assert said == [left, left, [], []]
    assert front.visits.entries()[0][0][:2] == (other.id, front.now)


def test_a_new_description_of_the_house_is_a_new_welcome():
    front = Front()
    page = front.page(HELLO)
    front.lobby(house={"version": "1", "inputs": [{"name": "3.text"}], "views": []})
    front.visits.tick()
    front.visits.tick()
    assert [m["inputs"] for m in of(page, "welcome")] == [[], [{"name": "3.text"}]]


BAD = [
    b"", b"{", b"[]", b"1", b"null", b'"hello"', b'{"type":"other"}', b'{"type":1}', b"{}",
    b'{"type":"want"}', b'{"type":"leave"}', b'{"type":"hello","ticket":7}', b"\xff\xfe",
    b'{"type":"hello","ticket":"' + b"a" * 3000 + b'"}', b"[" * 5000, b'{"type":NaN}',
]  # fmt: skip


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_what_is_not_spoken_here_ends_the_socket_in_a_sentence(data):
    front = Front()
    page = front.page()
    with pytest.raises(visits.TooMuch, match=r"\.$"):
        front.visits.heard(page, data)


@settings(max_examples=int(os.environ.get("LIVEDIFFUSION_TRIES", "40")), deadline=None)
@given(st.binary(max_size=300) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(
        st.sampled_from(["type", "ticket", "values", "replica"]) | st.text(), x), max_leaves=20,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_anything_is_taken_or_refused(data):
    front = Front()
    page = front.page(HELLO, WANT)
    with contextlib.suppress(visits.TooMuch):
        front.visits.heard(page, data)
    front.visits.entries()
    json.dumps(page.heard)


def test_a_page_that_says_too_much_is_let_go():
    front = Front()
    page = front.page(HELLO)
    with pytest.raises(visits.TooMuch, match="a second"):
        for _ in range(1000):
            front.say(page, WANT)
    calm = front.page(HELLO)
    for _ in range(1000):
        front.now += 1 / visits.MESSAGES
        front.say(calm, WANT)


def test_sockets_of_one_address_are_counted_however_they_end():
    front = Front()
    front.visits._most_each = 3
    for _ in range(3):
        own = [front.page(HELLO, address="a") for _ in range(3)]
        for _ in range(5):
            with pytest.raises(visits.Full, match=r"address.*\.$"):
                front.page(address="a")
        front.page(HELLO, address="b")
        front.page(HELLO)  # this machine's own are not counted
        for one in own:
            front.visits.closed(one)
            front.visits.closed(one)


def test_sockets_are_counted_and_those_that_say_nothing_are_closed():
    front = Front(most=3)
    silent = [front.page() for _ in range(3)]
    with pytest.raises(visits.TooMuch):
        front.page()
    front.now += visits.HELLO + 1
    front.visits.tick()
    assert all(of(one, "closed") for one in silent)
    front.page(HELLO)
