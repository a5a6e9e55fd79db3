"""What the inputs of Live Camera and Live Send promise is what their sources and sinks take."""

import importlib.util
import pathlib

import pytest
from livediffusion.live.faults import Refused
from livediffusion.live.sinks import KINDS, USUAL, checked_target
from livediffusion.live.sources import PULLED, SENT, kind
from livediffusion.nodes import live, send

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]
DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
NAMES = sorted({name for _, name in PULLED.values()})


def inputs(node):
    return {one.id: one for one in node.define_schema().inputs}


@pytest.fixture(autouse=True)
def all_installed(monkeypatch):
    """No adapter refuses for what is lacking here: only for what it was told."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: found(name, *a) or True)


def test_a_camera_offers_what_there_is():
    assert {*inputs(live.LiveCamera)["source"].options} == {"browser", "file", *SENT, *PULLED}
    said = inputs(live.LiveCamera)["source"].tooltip + (DOCS / "sources.md").read_text()
    assert all(f"{source}" in said for source in (*SENT, *PULLED))


@pytest.mark.parametrize("source", PULLED)
@pytest.mark.parametrize("empty", ["", "  "])
def test_the_input_that_names_a_source_is_the_one_that_says_so(source, empty):
    given, (_, own) = inputs(live.LiveCamera), PULLED[source]
    for name in NAMES:
        assert (source in given[name].tooltip.split(":")[0]) == (name == own)
    # what it stands at at first is no source: no tooltip may promise one, and the node says which
    # input is to be filled in
    assert given[own].default == "" and "empty" not in given[own].tooltip.lower()
    with pytest.raises(Refused, match=f"^{own}: "):
        kind(source).check(empty)


@pytest.mark.parametrize("to", KINDS)
def test_a_sink_that_needs_an_address_says_so(to):
    given = inputs(send.LiveSend)
    assert {*given["to"].options} == {*KINDS}
    assert to in given["to"].tooltip and to in (DOCS / "sinks.md").read_text()
    refusal = None
    try:
        checked_target(**USUAL | {"to": to})
    except Refused as reason:
        refusal = str(reason)
    needs = to in given["address"].tooltip
    assert needs == (refusal is not None and refusal.startswith("address: "))
    assert refusal is None or refusal.split(":")[0] in given
