"""Every number of ours is one of its range, whatever a wire brings."""

import asyncio
import contextlib
import types

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.comfy

NONE = [None, "5", b"5", [], {}, object(), 1j, torch.ones(2), float("nan"), float("inf"),
        float("-inf"), 10**400, -(10**400), torch.tensor(float("nan"))]  # fmt: skip
# nodes that look at their numbers themselves while live, where a bad one leaves the one before
# (tests/live/test_faults.py, test_ends.py); in an ordinary prompt they refuse as all do
THEMSELVES = {"LiveCamera", "LiveSend"}


def registered():
    from livediffusion.nodes.extension import LiveDiffusionExtension

    return {n.define_schema().node_id: n
            for n in asyncio.run(LiveDiffusionExtension().get_node_list())}  # fmt: skip


def numbers(node):
    return [one for one in node.define_schema().inputs if one.get_io_type() in ("INT", "FLOAT")]


def bad(one):
    own = [0.5 + one.min] if one.get_io_type() == "INT" else []
    return [*NONE, *own, one.min - 1, one.max + 1, np.float32(one.min - 1), -0.001 + one.min]


def refusal(function, given):
    """What is said to these inputs; None where they are taken so far, whatever comes of them."""
    with contextlib.suppress(Exception):
        try:
            function(**given)
        except ValueError as reason:
            return str(reason)
    return None


def test_every_number_of_every_node_is_refused_in_words_that_name_it(comfyui):
    count = 0
    for name, node in registered().items():
        inputs = {one.id: getattr(one, "default", None) for one in node.define_schema().inputs}
        # nobody who is asked gets this far
        node.hidden = types.SimpleNamespace(unique_id="1", extra_pnginfo=None, prompt=None)
        for one in numbers(node):
            assert one.min is not None and one.max is not None, (name, one.id)
            for value in bad(one):
                given = inputs | {one.id: value}
                for entrance in ("execute", "check_lazy_status"):
                    if entrance in vars(node):
                        said = refusal(getattr(node, entrance), given) or ""
                        assert said.startswith(f"{one.id}: "), (name, one.id, value, said)
                        assert "cannot be. Give" in said and len(said) < 160
                        count += 1
    assert count > 500


def test_numbers_of_the_range_arrive_as_pythons_own(comfyui):
    from livediffusion.nodes.ranges import number, ranges

    found = {(name, key): allowed for name, node in registered().items()
             for key, allowed in ranges(node).items()}  # fmt: skip
    assert len(found) > 50
    for name, node in registered().items():
        for one in numbers(node):
            allowed = found[name, one.id]
            for value in (one.min, one.max, one.default):
                assert number(one.id, value, allowed) == value
    kind = found["LiveMemory", "interval"], found["LiveMemory", "carry"]
    for wired in (1, 1.0, True, np.int64(1), np.float32(1), np.array(1), torch.tensor(1.0)):
        given = [number("x", wired, allowed) for allowed in kind]
        assert given == [1, 1.0] and [type(one) for one in given] == [int, float]
    seed = found["LiveStreamSampler", "noise_seed"]
    assert number("x", np.uint64(2**64 - 1), seed) == 2**64 - 1, "to the last digit"


def test_a_hair_beyond_an_end_is_that_end(comfyui):
    """What comes out of arithmetic: 0.1 * 3 / 0.3 is more than 1."""
    from livediffusion.nodes import ranges

    allowed = ranges.Range(0.0, 1.0, False)
    assert 0.1 * 3 / 0.3 > 1.0
    assert ranges.number("share", 0.1 * 3 / 0.3, allowed) == 1.0
    assert ranges.number("share", -1e-9, allowed) == 0.0 == ranges.number("share", -1e-5, allowed)
    assert ranges.number("share", 0.9999999, allowed) == 0.9999999


def test_who_looks_at_numbers_himself_does_so_while_live_only(comfyui, monkeypatch):
    from livediffusion.live import frames

    nodes = registered()
    assert {name for name, node in nodes.items() if hasattr(node, "LIVE_CHECKS")} == THEMSELVES
    seen = []
    run = types.SimpleNamespace(
        image=lambda *given: (seen.append(given), (0, 0))[1],
        send=lambda *given: seen.append(given),
    )
    token = frames.current.set(run)
    try:
        for name, of_it in {"LiveCamera": "width", "LiveSend": "fps"}.items():
            node = nodes[name]
            node.hidden = types.SimpleNamespace(unique_id="1")
            inputs = {one.id: getattr(one, "default", None) for one in node.define_schema().inputs}
            node.execute(**inputs | {of_it: float("nan")})
    finally:
        frames.current.reset(token)
    assert len(seen) == len(THEMSELVES)


def test_it_is_one_refusal_that_a_live_run_survives(comfyui):
    from livediffusion.live.faults import Fate, Refused, fate
    from livediffusion.nodes.ranges import Range, number

    said = r"^carry: nan cannot be\. Give a number from 0\.0 to 1\.0\.$"
    with pytest.raises(Refused, match=said):
        number("carry", float("nan"), Range(0.0, 1.0, False))
    said = r"^frames: 2\.5 cannot be\. Give a whole number from 1 to 16"
    with pytest.raises(Refused, match=said):
        number("frames", 2.5, Range(1, 16, True))
    assert fate(Refused(), settled=True, edited=False) is Fate.ON
    assert fate(Refused(), settled=False, edited=True) is Fate.BACK
