"""torch.compile as an engine: how often it compiles, where, and what is said while it does.

Backends that count stand for inductor, whose code generator takes a minute on a CPU.
"""

import shutil
import sys
import threading
import time

import pytest
import tiny
import torch
from compiled_models import patched, sampled_once
from pairs import guider, settings

# an engine's own, the same with every ComfyUI
pytestmark = [pytest.mark.comfy, pytest.mark.slow]


@pytest.fixture(autouse=True)
def at_once(comfyui, monkeypatch):
    from livediffusion.host.models import engines
    from livediffusion.host.sampling import recordings

    monkeypatch.setattr(recordings, "REST", 0.0)
    monkeypatch.setattr(engines, "REST", 0.0)
    torch._dynamo.reset()
    with torch.inference_mode():
        yield


class Counting:
    """A backend of torch.compile that runs the graph as it is.

    Attributes:
        compiled: the threads that it was called in.
        go: it waits for this.
    """

    def __init__(self):
        self.compiled = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, graph, example):
        self.compiled.append(threading.current_thread())
        assert self.go.wait(60)
        return graph


class Small(torch.nn.Module):
    """Stands for a UNet where its size does not matter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.module = self

    def forward(self, call):
        return call.x * self.weight + call.timesteps.view(-1, 1, 1, 1)

    def bare(self):
        return self


class Broken(Small):
    def forward(self, call):
        torch._dynamo.graph_break()
        return super().forward(call)


def asked(rows, size=8):
    from livediffusion.compiled.engine import Call, Shapes

    call = Call(torch.ones(rows, 4, size, size), torch.ones(rows), None)
    return call, Shapes.of(call)


def light(patcher):
    """The same MODEL with a network that is traced at once; it reads the weight of `patched`."""
    unet = patcher.model.diffusion_model
    weight = unet.input_blocks[3][0].in_layers[2]
    unet._forward = lambda x, *args, **kwargs: x * (0.5 + weight.weight.mean())
    return patcher


def on(patcher, backend, beside=True):
    from livediffusion.compiled.inductor import Inductor
    from livediffusion.host.models.engines import Attached, attach

    said = []
    attached = Attached("inductor", "chosen", lambda: Inductor(backend), said.append, beside=beside)
    attached.said = said
    return attach(patcher, attached), attached


def made(attached, run):
    """Calls until an engine that is made beside is there."""
    end = time.monotonic() + 60
    while attached.stats()["making"] is not None:
        assert time.monotonic() < end
        time.sleep(0.01)
        run()


def test_ten_shapes_are_ten_compilations_however_often_they_come():
    """Each engine has a code object of its own: torch compiles one eight times at most."""
    from livediffusion.compiled.inductor import Inductor

    backend, engines = Counting(), {}
    for turn in range(3):
        for rows in range(1, 11):
            call, shapes = asked(rows)
            if turn == 0:
                engines[rows] = Inductor(backend)
                engines[rows].prepare(Small(), shapes)
                assert len(backend.compiled) == rows
            assert torch.equal(engines[rows](call), torch.full_like(call.x, 3.0))
    assert len(backend.compiled) == 10


def test_ten_shapes_of_one_model_are_ten_compilations():
    """The engines of a MODEL are kept: coming back to a size compiles nothing."""
    base, backend = light(tiny.model()), Counting()
    model, attached = on(base, backend, beside=False)
    truth = {rows: sampled_once(base, rows) for rows in range(1, 11)}
    for _ in range(2):
        for rows in truth:
            for _ in range(4):
                out = sampled_once(model, rows)
            assert tiny.rms(out, truth[rows]) <= 1e-6
    assert len(backend.compiled) == len(attached.stats()["made"]) == 10
    assert attached.fell_back == 0


def test_a_graph_break_is_told_and_never_run(caplog):
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.inductor import Inductor

    _, shapes = asked(2)
    with pytest.raises(Refused, match=r"as one graph: .*graph_break"):
        Inductor("eager").prepare(Broken(), shapes)
    base = tiny.model()
    unet = base.model.diffusion_model
    before = unet._forward

    def looking(x, timesteps, *args, **kwargs):
        torch._dynamo.graph_break()
        return before(x, timesteps, *args, **kwargs)

    unet._forward = looking
    model, attached = on(base, Counting())
    for _ in range(4):
        out = sampled_once(model)
    made(attached, lambda: sampled_once(model))
    assert tiny.rms(sampled_once(model), out) <= 1e-6
    assert "as one graph" in attached.reason and attached.ran == 0
    assert any("as one graph" in line for line in attached.said)
    assert attached.stats()["making"] is None and attached.stats()["made"] == []


def test_a_stream_goes_on_while_it_is_compiled():
    """Not a frame waits, the node says what is going on, and the ring's full shape only is made."""
    from livediffusion.host.sampling.stream import Stream

    base, backend = tiny.model(), Counting()
    backend.go.clear()
    model, attached = on(base, backend)
    plain, stream = Stream(), Stream()
    guiders = guider(base), guider(model)
    for i in range(12):
        a, b = (
            one.run(guide, tiny.latents(1, i), settings())
            for one, guide in zip((plain, stream), guiders, strict=True)
        )
        assert tiny.rms(b, a) <= 1e-6
    assert attached.ran == 0 and attached.fell_back == 0
    assert attached.stats()["making"].startswith("4 rows of 8 x 8 latents")
    assert "until then the UNet itself runs" in attached.said[-1]
    backend.go.set()
    made(attached, lambda: stream.run(guiders[1], tiny.latents(1, 0), settings()))
    stream.run(guiders[1], tiny.latents(1, 1), settings())
    assert attached.ran > 0 and attached.said[-1] == "inductor: chosen"
    assert threading.main_thread() not in backend.compiled and len(backend.compiled) == 1


def test_clips_compile_their_full_rings_only():
    """A ring that fills and drains in each run has every smaller number of rows twice."""
    from livediffusion.host.sampling.stream import Stream

    base, backend = tiny.model(), Counting()
    model, attached = on(base, backend, beside=False)
    guide, stream = guider(model), Stream()
    for i in range(6):
        stream.run(guide, tiny.latents(6, i), settings(drain=True))
    assert len(backend.compiled) == 1
    assert [str(shapes)[:6] for shapes in _shapes(attached)] == ["4 rows"]


def _shapes(attached):
    return [key[0] for key in attached._engines]


def test_weights_of_another_kind_are_compiled_for_beside():
    """A LoRA may replace what was loaded by what torch.compile guards against; never in a call."""
    with torch.inference_mode(False):
        base = light(tiny.model())
    backend = Counting()
    model, attached = on(base, backend)
    for strength in (None, 0.3, 0.6, None):
        both = (base, model)
        if strength is not None:
            both = tuple(patched(patcher, strength) for patcher in both)
        for _ in range(5):
            assert tiny.rms(sampled_once(both[1]), sampled_once(both[0])) <= 1e-6, strength
        ran, end = attached.ran, time.monotonic() + 60
        # weights that move while it is compiled let it fail, and it is tried again
        while attached.ran == ran or attached.stats()["making"] is not None:
            assert time.monotonic() < end, attached.reason
            sampled_once(both[1])
        ran = attached.ran
        assert tiny.rms(sampled_once(both[1]), sampled_once(both[0])) <= 1e-6
        assert attached.ran == ran + 1, (strength, attached.reason)
    assert threading.main_thread() not in backend.compiled
    assert attached.reason is None


def test_threads_take_turns_quickly_while_one_compiles_and_no_longer():
    from livediffusion.host.models.making import Making

    usual = sys.getswitchinterval()
    seen, go = [], threading.Event()

    class Engine:
        def prepare(self, unet, shapes):
            seen.append((sys.getswitchinterval(), torch.is_inference_mode_enabled()))
            assert go.wait(60)
            raise RuntimeError("no memory")

    both = [Making((), asked(1)[1], Engine(), Small()) for _ in range(2)]
    for making in both:
        making.start()
    end = time.monotonic() + 60
    while len(seen) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not any(making.done for making in both)
    go.set()
    while not all(making.done for making in both):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert all(interval < usual and inference for interval, inference in seen)
    assert sys.getswitchinterval() == usual
    assert [str(making.error) for making in both] == ["no memory"] * 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on a CPU")
def test_inductor_itself():
    """A small network through inductor's own code, made in a thread and called from here."""
    from livediffusion.compiled.inductor import Inductor
    from livediffusion.host.models.making import Making

    call, shapes = asked(2)
    making = Making((), shapes, Inductor(), Small())
    making.start()
    while not making.done:
        time.sleep(0.05)
    assert making.error is None
    assert torch.equal(making.engine(call), torch.full_like(call.x, 3.0))
