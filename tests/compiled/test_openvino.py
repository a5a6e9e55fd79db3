"""OpenVINO's UNets against ComfyUI itself; and which of the two runs where both could."""

import itertools
import os
import threading

import pytest
import tiny
import torch
from compiled_models import call, lora

# an engine's own, the same with every ComfyUI
pytestmark = [pytest.mark.comfy, pytest.mark.slow]
pytest.importorskip("onnx")
pytest.importorskip("openvino")

# as those of test_onnx.py; a shape costs a compilation here, so rows and sizes come in pairs
SHAPES = [
    (rows, size, tokens)
    for (rows, size), tokens in zip(
        itertools.product((1, 2, 5, 8), ((8, 8), (16, 24))), itertools.cycle((77, 154))
    )
]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def unet_of(patcher):
    """The UNet of a MODEL, its weights loaded."""
    import comfy.model_management
    from livediffusion.host.models.unet import ComfyUNet

    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    return ComfyUNet(patcher.model.diffusion_model)


def engine(unet, asked, precision="default", folder=None, note=lambda text: None):
    """OpenVINO made for this call."""
    from livediffusion.compiled.engine import Shapes
    from livediffusion.compiled.ov.network import Asked
    from livediffusion.compiled.ov.unet import OpenVino

    made = OpenVino(Asked("CPU", precision, folder), note)
    made.prepare(unet, Shapes.of(asked))
    return made


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_equals_eager(layout, comfyui):
    equal(layout, SHAPES[-1:], False)


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True], ids=["plain", "controlnet"])
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_equals_eager_in_every_shape(layout, control, comfyui):
    """Every number of rows, size and prompt length, of one export."""
    shapes = SHAPES[4:5] if control else SHAPES[1:2]  # the rest with LIVEDIFFUSION_LONG set
    equal(layout, SHAPES if "LIVEDIFFUSION_LONG" in os.environ else shapes, control)


def equal(layout, shapes, control):
    patcher = tiny.model(layout=layout)
    unet = unet_of(patcher)
    for rows, size, tokens in shapes:
        asked = call(patcher, rows, size, tokens, control=control, seed=rows)
        made = engine(unet, asked)
        assert tiny.rms(made(asked), unet(asked)) <= 1e-5, (rows, size, tokens)


@pytest.fixture
def one(comfyui):
    """A UNet and a call of it."""
    patcher = tiny.model(prompt=1.0)
    return unet_of(patcher), call(patcher, 2)


def test_a_lora_is_in_it(comfyui):
    patcher = tiny.model()
    asked = call(patcher, 2)
    plain = unet_of(patcher)(asked)
    unet = unet_of(lora(patcher))
    made = engine(unet, asked)
    assert tiny.rms(made(asked), unet(asked)) <= 1e-5
    assert tiny.rms(made(asked), plain) > 1e-3


# what was measured, with room: the embedded model's errors stand in docs/engines.md
@pytest.mark.parametrize(("precision", "least", "most"), [
    ("default", 0.0, 1e-5), ("bfloat16", 1e-4, 3e-2), ("int8", 1e-4, 3e-2),
])  # fmt: skip
def test_a_precision_tells_its_error(precision, least, most, one):
    """Observed frames of int8 are float32's; then what was asked for, and the node's line."""
    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.ov import int8

    unet, asked = one
    said = []
    try:
        made = engine(unet, asked, precision, note=said.append)
    except Refused as refused:
        pytest.skip(str(refused))
    truth = unet(asked)
    for _ in range(int8.FRAMES if precision == "int8" else 0):
        assert tiny.rms(made(asked), truth) <= 1e-5 and not said
    error = tiny.rms(made(asked), truth)
    assert least <= error <= most
    assert made.error == pytest.approx(error, rel=1e-3)
    what = "float32" if precision == "default" else precision
    assert said == [f"{what} on the CPU, relative error {made.error:.1e} against the UNet itself"]
    assert made.describe()["error"] == made.error


def test_int8_rounds_what_is_inside(one, tmp_path):
    """The largest resolution, the network's ends and what is no convolution stay as they are."""
    from livediffusion.compiled.engine import Shapes
    from livediffusion.compiled.exports import exported
    from livediffusion.compiled.ov import api, int8

    unet, asked = one
    shapes = Shapes.of(asked)
    with exported(unet, shapes, torch.float32) as path:
        model = api.core().read_model(str(path))
    model.reshape(dict(shapes.sizes))
    layers = int8._layers(model)
    assert layers and all(node.output(0).get_shape()[-1] == 4 for node in layers)
    int8.quantise(model, {node.get_friendly_name(): (-1.0, 1.0) for node in layers})
    rounded = [n for n in model.get_ordered_ops() if n.get_type_name() == "FakeQuantize"]
    assert len(layers) < len(rounded) <= 2 * len(layers)  # a source may feed several


def test_tensors_are_taken_where_they_lie(one):
    """What is given once stays bound, what has gone away is never read, an output is one's own."""
    unet, asked = one
    made = engine(unet, asked)
    truth = unet(asked)
    first = made(asked)
    program = made._network._program
    bound = {name: program._bound[name][1] for name in asked.named()}
    second = made(asked)
    assert all(program._bound[name][1] is shared for name, shared in bound.items())
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    kept = second.clone()
    for seed in range(20):
        # copies, gone before the next call: transposed ones are laid out anew
        passing = type(asked)(
            asked.x.transpose(2, 3).clone().transpose(2, 3) * (seed + 1), asked.timesteps + 0,
            asked.context * 1,
        )  # fmt: skip
        made(passing)
        del passing
    assert torch.equal(second, kept)
    assert tiny.rms(made(asked), truth) <= 1e-5


def test_what_was_compiled_is_kept(one, tmp_path):
    """Read again where it is whole; made anew where it is cut, and for other weights."""
    unet, asked = one
    truth = unet(asked)
    assert not engine(unet, asked, folder=tmp_path).describe()["kept"]
    again = engine(unet, asked, folder=tmp_path)
    assert again.describe()["kept"] and tiny.rms(again(asked), truth) <= 1e-5
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[:40], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(broken)
        made = engine(unet, asked, folder=tmp_path)
        assert not made.describe()["kept"] and tiny.rms(made(asked), truth) <= 1e-5
    patcher = tiny.model(seed=1)
    other = unet_of(patcher)
    made = engine(other, asked, folder=tmp_path)
    assert not made.describe()["kept"] and tiny.rms(made(asked), other(asked)) <= 1e-5


def test_the_folder_is_bounded(tmp_path, monkeypatch, comfyui):
    from livediffusion.compiled.ov import cache

    monkeypatch.setattr(cache, "FILES", 3)
    for i in range(6):
        cache.write(tmp_path, f"file{i}", bytes(10 + i))
        os.utime(tmp_path / f"file{i}.openvino", (i, i))
    assert len(list(tmp_path.iterdir())) == 3
    assert cache.read(tmp_path, "file5") == bytes(15) and cache.read(tmp_path, "file0") is None


@pytest.mark.parametrize(("device", "precision", "said"), [
    ("NPU", "default", "device: OpenVINO finds no NPU here, only CPU"),
    ("GPU", "int8", "device: OpenVINO finds no GPU here, only CPU"),
    ("CPU", "float16", "precision: this CPU does not compute in float16; it does in default"),
])  # fmt: skip
def test_what_is_not_here_is_refused_in_words(device, precision, said, monkeypatch, comfyui):
    from livediffusion.compiled import choice
    from livediffusion.compiled.ov import api

    class Core:
        available_devices = ("CPU",)

        def get_property(self, name, what):
            return ["FP32", "BF16", "INT8"]

    monkeypatch.setattr(api, "core", lambda: Core())
    wish = choice.Wish(precision, device)
    assert choice.missing("openvino", torch.device("cpu"), wish).startswith(said)
    assert "on the CPU" in choice.missing("openvino", torch.device("cuda"), wish)


class Beside:
    """An engine of the test's own beside eager, on a clock that only calls move.

    Args:
        costs: seconds of a call.
        off: added to what the UNet gives.
    """

    name, remembers, mixes = "own", False, False

    def __init__(self, clock, costs, off=0.0, trouble=None):
        self.clock, self.costs, self.off, self.trouble = clock, costs, off, trouble
        self.go, self.released, self.ran = threading.Event(), 0, 0

    def prepare(self, unet, shapes):
        assert self.go.wait(30)
        self.unet = unet
        if self.trouble:
            raise self.trouble

    def __call__(self, asked):
        self.ran += 1
        self.clock[0] += self.costs
        return self.unet.network(asked) + self.off

    def describe(self):
        return {"engine": self.name}

    def release(self):
        self.released += 1


class Network:
    """A UNet that takes a second of the same clock."""

    module = torch.nn.Linear(2, 2)

    def __init__(self, clock):
        self.clock = clock

    def network(self, asked):
        return asked.x * 2

    def __call__(self, asked):
        self.clock[0] += 1.0
        return self.network(asked)

    def copied(self):
        return Network([0.0])


def beside(kept, said, **told):
    """(the choice, its engine, a call): prepared, its engine not made yet."""
    from livediffusion.compiled.engine import Call, Shapes
    from livediffusion.compiled.faster import Faster

    clock = [0.0]
    own = Beside(clock, **told)
    made = Faster(lambda: own, kept, lambda: "here", said.append, lambda: clock[0])
    asked = Call(torch.ones(1, 4, 8, 8), torch.ones(1), None)
    made.prepare(Network(clock), Shapes.of(asked))
    return made, own, asked


def run(made, own, asked, calls=20):
    """Calls before it is made and after; all of them give what the UNet does."""
    making = [t for t in threading.enumerate() if t.name == "livediffusion-own"]
    assert making and not any(t.daemon for t in making)  # Python would end it inside a library
    for _ in range(3):  # nothing waits for it
        assert torch.equal(made(asked), asked.x * 2) and own.ran == 0
    own.go.set()
    assert made._made.wait(30)
    for _ in range(calls):
        assert torch.equal(made(asked), asked.x * 2)


@pytest.mark.parametrize(
    ("costs", "chosen", "said"),
    [
        (0.5, "own", "own is 2.00 times as fast as eager here"),
        (0.99, "eager", "eager, as own is 1.01 times as fast here"),
        (2.0, "eager", "eager, as own is 0.50 times as fast here"),
    ],
)
def test_auto_takes_the_faster_one(costs, chosen, said, tmp_path, comfyui):
    from livediffusion.compiled.kept import Kept

    told = []
    made, own, asked = beside(Kept(tmp_path / "m.json"), told, costs=costs)
    run(made, own, asked)
    assert made.chosen == chosen == made.describe()["engine"] and told == [said]
    assert own.released == (chosen == "eager")
    # the next start knows; what is slower is not even made
    made, own, asked = beside(Kept(tmp_path / "m.json"), told, costs=costs)
    if chosen == "eager":
        assert made.chosen == "eager" and torch.equal(made(asked), asked.x * 2) and own.ran == 0
    else:
        run(made, own, asked, 2)
        assert made.chosen == "own" and own.ran == 2
    assert told == [said] * 2


@pytest.mark.parametrize(("how", "said"), [
    ({"off": 0.01}, "eager, as own is 5.0e-03 from the UNet itself"),
    ({"trouble": RuntimeError("no kernel")}, "eager, as own cannot: RuntimeError: no kernel"),
])  # fmt: skip
def test_auto_never_takes_one_that_fails_or_differs(how, said, comfyui):
    from livediffusion.compiled.kept import Kept

    told = []
    made, own, asked = beside(Kept(), told, costs=0.1, **how)
    run(made, own, asked)
    assert made.chosen == "eager" and told == [said]


def test_what_was_measured_is_read_as_a_strangers(tmp_path, comfyui):
    from livediffusion.compiled import kept

    path = tmp_path / "m.json"
    for text in ("", "[]", "{\"a\": \"b\"}", "{\"a\": 1e999}", "{" * 100, "{\"a\": [1]}"):
        path.write_text(text)
        assert kept.Kept(path).get("a") is None
    for i in range(kept.MOST + 9):
        kept.Kept(path).put(f"key, {i}", i)
    assert kept.Kept(path).get("key, 0") is None
    assert kept.Kept(path).get(f"key, {kept.MOST + 8}") == kept.MOST + 8


def test_auto_runs_openvino_beside_a_real_stream(comfyui, monkeypatch):
    """The real engine, made in its thread while the UNet runs; no call fails or differs."""
    from livediffusion.compiled import choice, faster
    from livediffusion.compiled.engine import Shapes

    monkeypatch.setattr(faster, "LEAST", 0.0)
    patcher = tiny.model()
    unet, asked = unet_of(patcher), call(patcher, 2)
    made = choice.make_faster("openvino", torch.device("cpu"))
    made.prepare(unet, Shapes.of(asked))
    truth = unet(asked)
    assert tiny.rms(made(asked), truth) <= 1e-5
    assert made._made.wait(120)
    for _ in range(2 * faster.TURNS + 2):
        assert tiny.rms(made(asked), truth) <= 1e-5
    assert made.chosen == "openvino" and made.gain > 0


def test_one_that_does_not_load_is_told_in_words(monkeypatch):
    """Installed, and its libraries are not there."""
    import importlib

    from livediffusion.compiled.engine import Refused
    from livediffusion.compiled.ov import api

    def broken(name):
        raise ImportError("libtbb.so.12: cannot open shared object file")

    api.core.cache_clear()
    monkeypatch.setattr(importlib, "import_module", broken)
    for place, precision in (("CPU", "default"), ("auto", "int8")):
        reason = api.refused(torch.device("cpu"), place, precision)
        assert "openvino is installed and does not load (libtbb" in reason
    with pytest.raises(Refused, match="does not load"):
        api.version()
