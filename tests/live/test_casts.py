"""ComfyUI's reset of its buffers after each node (dynamic VRAM): in a live run where there is
something to reset, as ever for everybody else."""

import asyncio
import collections
import types

import comfy.model_management as management
import inprocess
import pytest
from inprocess import Client, flat, graph
from livediffusion.live import casts
from livediffusion.live.casts import unhurried

pytestmark = pytest.mark.comfy

REAL = getattr(management, "reset_cast_buffers", None)


class Thing:
    """Whatever lies in what is given back."""

    _comfy_cross_step_state = "from token to token"

    def __init__(self):
        self._comfy_cross_step_state = "of this token"

    def bounce(self):
        pass


@pytest.fixture(autouse=True)
def paged(monkeypatch):
    """ComfyUI as it is on NVIDIA, where its executor resets after each node; what the device is
    asked for."""
    if REAL is None:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    asked = collections.Counter()

    def count(name):
        monkeypatch.setattr(management, name, lambda *_: asked.update([name]))

    monkeypatch.setattr("comfy.memory_management.aimdo_enabled", True)
    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    count("synchronize")
    count("soft_empty_cache")
    yield asked
    assert management.reset_cast_buffers is REAL


async def feed(client, frames):
    """Camera frames, each once the one before it was seen."""
    for i in range(frames):
        seen = len(client.views)
        await client.send(flat(50 + i))
        await client.wait(lambda seen=seen: client.closed or len(client.views) > seen)
        await asyncio.sleep(0)


def waited(asked):
    """How often the real one has run since."""
    assert asked["synchronize"] == asked["soft_empty_cache"]
    return asked.pop("synchronize", 0) and asked.pop("soft_empty_cache")


def test_frames_wait_for_nothing_and_what_comes_after_does(paged):
    """Two runs one after the other, and an ordinary prompt."""
    with inprocess.comfy() as (comfy, _):
        ordinary = {
            "1": {"class_type": "TestLoader", "inputs": {"name": "other"}},
            "2": {"class_type": "TestEncode", "inputs": {"model": ["1", 0], "text": "7"}},
            "3": {"class_type": "EmptyImage", "inputs": {
                "width": 8, "height": 8, "batch_size": 1, "color": 0}},
            "4": {"class_type": "TestWork", "inputs": {"image": ["3", 0], "cond": ["2", 0]}},
            "5": {"class_type": "TestSave", "inputs": {"image": ["4", 0]}},
        }  # fmt: skip

        async def work(http):
            client = await Client.start(http, comfy.url, graph())
            await feed(client, 1)
            waited(paged)  # for the nodes before the frontier
            await feed(client, 10)
            assert waited(paged) == 0 and management.reset_cast_buffers is not REAL
            await client.stop()
            return client.begun["prompt_id"]

        for _ in range(2):
            comfy.wait_for(inprocess.live(work))
            assert waited(paged) == 1
        comfy.wait_for(comfy.put(ordinary, ["5"]))
        assert waited(paged) == 5


@pytest.mark.parametrize("how", ["a node fails", "Cancel"])
def test_a_run_that_breaks_off_gives_everything_back(paged, how):
    import nodes

    with inprocess.comfy() as (comfy, world):

        async def work(http):
            client = await Client.start(http, comfy.url, graph())
            await feed(client, 2)
            waited(paged)
            if how == "Cancel":
                nodes.interrupt_processing()
            else:
                world.fail = "keep"
            await feed(client, 1)
            await client.wait(lambda: client.closed)
            return client.begun["prompt_id"]

        comfy.wait_for(inprocess.live(work))
        assert waited(paged) == 1 and management.reset_cast_buffers is REAL


@pytest.mark.parametrize("name", casts._GIVEN_BACK)
def test_where_there_is_something_it_is_given_back_at_once(paged, name):
    held = getattr(management, name, None)
    if held is None:
        pytest.skip("this ComfyUI has none")
    thing = Thing()
    with unhurried():
        management.reset_cast_buffers()
        assert waited(paged) == 0
        if isinstance(held, dict):
            held[None] = thing
        else:
            held.add(thing)
        management.reset_cast_buffers()
        assert waited(paged) == 1 and not held
        management.reset_cast_buffers()
        assert waited(paged) == 0
    assert waited(paged) == 1


def broken(*_):
    raise RuntimeError("the device is gone")


def test_what_went_wrong_first_is_what_is_told(monkeypatch, caplog):
    monkeypatch.setattr(management, "synchronize", broken)
    with pytest.raises(management.InterruptProcessingException), unhurried():
        raise management.InterruptProcessingException
    assert "the device is gone" in caplog.text
    with pytest.raises(RuntimeError, match="the device is gone"), unhurried():
        pass


def test_who_wraps_it_in_a_run_has_the_real_one_afterwards(paged, monkeypatch):
    with unhurried():
        ours = management.reset_cast_buffers
        wrapped = types.FunctionType(ours.__code__, ours.__globals__, "theirs", None,
                                     ours.__closure__)  # fmt: skip
        management.reset_cast_buffers = wrapped
    assert management.reset_cast_buffers is wrapped and waited(paged) == 1
    management.reset_cast_buffers()
    assert waited(paged) == 1
    with unhurried():
        assert management.reset_cast_buffers is wrapped
    management.reset_cast_buffers = REAL


def test_this_comfyui_gives_back_what_is_known():
    with unhurried():
        assert management.reset_cast_buffers is not REAL


@pytest.mark.parametrize("what", ["it gives back more", "no streams", "no pages"])
def test_where_it_cannot_be_told_it_stays(monkeypatch, what):
    if what == "it gives back more":
        monkeypatch.setattr(casts, "_GIVEN_BACK", casts._GIVEN_BACK[1:])
    elif what == "no streams":
        monkeypatch.setattr(management, "NUM_STREAMS", 0)
    else:
        monkeypatch.setattr("comfy.memory_management.aimdo_enabled", False)
    with unhurried():
        assert management.reset_cast_buffers is REAL
