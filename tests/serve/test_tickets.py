"""Tickets: one house's, of one kind, for a time."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import served

tickets = served("tickets")
KEY = b"k" * 32


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def house(key=KEY):
    clock = Clock()
    return tickets.Tickets(key, clock), clock


def test_says_what_was_put_in_until_it_is_over():
    ours, clock = house()
    text = ours.make(tickets.STREAM, 10, id="a", replica="r", until=None)
    said = ours.read(text, tickets.STREAM)
    assert (said["id"], said["replica"], said["until"], said["exp"]) == ("a", "r", None, 1010)
    clock.now = 1009.9
    ours.read(text, tickets.STREAM)
    clock.now = 1010
    with pytest.raises(tickets.Refused, match="over"):
        ours.read(text, tickets.STREAM)


@pytest.mark.parametrize("kind", [tickets.VISIT, tickets.STREAM, tickets.OPERATOR])
@pytest.mark.parametrize("other", [tickets.VISIT, tickets.STREAM, tickets.OPERATOR])
def test_opens_its_kind_alone(kind, other):
    ours, _ = house()
    text = ours.make(kind, 10, id="a")
    if kind == other:
        assert ours.read(text, other)["kind"] == kind
    else:
        with pytest.raises(tickets.Refused, match="something else"):
            ours.read(text, other)


def test_nobody_writes_its_end_into_it():
    ours, _ = house()
    said = ours.read(ours.make(tickets.VISIT, 10, exp=1e12), tickets.VISIT)
    assert said["exp"] == 1010


def test_another_house_reads_none_of_it():
    ours, _ = house()
    theirs, _ = house(b"x" * 32)
    with pytest.raises(tickets.Refused, match="not from here"):
        theirs.read(ours.make(tickets.VISIT, 10), tickets.VISIT)
    with pytest.raises(ValueError, match="16 bytes"):
        tickets.Tickets(b"short")


@given(st.data())
def test_no_other_text_is_the_same_ticket(data):
    ours, _ = house()
    text = ours.make(tickets.STREAM, 10, id="a", replica="r")
    place = data.draw(st.integers(0, len(text) - 1))
    put = data.draw(st.sampled_from(["", "A", "_", "=", ".", "\x00", "\u00e9", " ", "\n", "AA"]))
    other = text[:place] + put + text[place + 1 :]
    if other != text:
        with pytest.raises(tickets.Refused):
            ours.read(other, tickets.STREAM)


@given(st.one_of(st.none(), st.text(), st.binary().map(lambda b: base64.b64encode(b).decode())))
def test_anything_else_is_refused_in_words(text):
    with pytest.raises(tickets.Refused):
        house()[0].read(text, tickets.VISIT)


@pytest.mark.parametrize(
    "claims", [[], 1, None, {"kind": "visit"}, {"kind": "visit", "exp": "1e9"},
               {"kind": "visit", "exp": float("inf")}, {"kind": "visit", "exp": True}]
)  # fmt: skip
def test_what_is_signed_but_no_ticket_is_refused(claims):
    ours, clock = house()
    clock.now = 5.0
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    signature = base64.urlsafe_b64encode(ours._signed(body)).rstrip(b"=").decode()
    with pytest.raises(tickets.Refused):
        ours.read(f"{body}.{signature}", tickets.VISIT)


def test_an_id_is_its_own():
    assert len({tickets.new_id() for _ in range(1000)}) == 1000
    assert len(tickets.new_key()) == 32
