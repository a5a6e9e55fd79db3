"""ComfyUI's UNets as ONNX files, run by ONNX Runtime, against ComfyUI itself."""

import copy
import itertools

import pytest
import tiny
import torch
from compiled_models import call, lora
from livediffusion.compiled.engine import Call

pytestmark = pytest.mark.comfy
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROWS = (1, 2, 5, 8)
SIZES = ((8, 8), (16, 24))
TOKENS = (77, 154)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def engine(patcher, asked):
    """ONNX Runtime made for this call, and the UNet itself."""
    import comfy.model_management
    from livediffusion.compiled.engine import Shapes
    from livediffusion.compiled.ort import OnnxRuntime
    from livediffusion.host.models.unet import ComfyUNet

    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    unet = ComfyUNet(patcher.model.diffusion_model)
    made = OnnxRuntime()
    made.prepare(unet, Shapes.of(asked))
    return made, unet


def half(patcher):
    """The model in float16, and the same numbers in float32 as the truth."""
    exact = copy.deepcopy(patcher.model.diffusion_model).half().float()
    patcher.model.diffusion_model.half().dtype = torch.float16
    return exact


@pytest.mark.parametrize(
    "control", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "controlnet"]
)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_equals_eager(layout, control, comfyui):
    """One file for every number of rows, size and prompt length."""
    patcher = tiny.model(layout=layout)
    made, unet = engine(patcher, call(patcher, 2, control=control))
    for rows, (size, tokens) in zip(
        ROWS, itertools.cycle([(SIZES[0], TOKENS[1]), (SIZES[1], TOKENS[0]), (SIZES[1], TOKENS[1])])
    ):
        asked = call(patcher, rows, size, tokens, control=control, seed=rows)
        assert tiny.rms(made(asked), unet(asked)) <= 1e-5, (rows, size, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("control", [False, True], ids=["plain", "controlnet"])
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_half_precision(layout, control, comfyui):
    """Against eager float16, and against the truth, which is nearer."""
    from livediffusion.host.models.unet import ComfyUNet

    patcher = tiny.model(layout=layout, prompt=1.0)
    exact = ComfyUNet(half(patcher))
    made, unet = engine(patcher, call(patcher, 2, dtype=torch.float16, control=control))
    for rows, size, tokens in ((1, (8, 8), 77), (4, (16, 24), 77), (5, (8, 8), 154)):
        asked = call(patcher, rows, size, tokens, torch.float16, control, seed=rows)
        wide = {name: tensor.float() for name, tensor in asked.named().items()}
        out = made(asked)
        assert out.dtype == torch.float16
        truth = exact(type(asked).of(wide))
        assert tiny.rms(out, truth) <= 1e-3
        assert tiny.rms(out, unet(asked)) <= 2e-3


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_a_lora_is_in_the_file(layout, comfyui):
    patcher = tiny.model(layout=layout)
    plain = engine(patcher, call(patcher, 2))[1](call(patcher, 2))
    made, unet = engine(lora(patcher), call(patcher, 2))
    asked = call(patcher, 4, (16, 24))
    assert tiny.rms(made(asked), unet(asked)) <= 1e-5
    assert tiny.rms(made(call(patcher, 2)), plain) > 0.01


@pytest.mark.slow
def test_the_embedded_model(comfyui):
    from livediffusion.demo import loader

    patcher = loader.load()[0]
    made, unet = engine(patcher, call(patcher, 2, (64, 64)))
    # also sizes that the map of positions and the levels do not divide
    for rows, size, tokens in ((1, (64, 64), 77), (5, (16, 24), 154), (2, (30, 43), 77)):
        asked = call(patcher, rows, size, tokens)
        assert tiny.rms(made(asked), unet(asked)) <= 1e-5
    exact = half(patcher)
    made, _ = engine(patcher, call(patcher, 2, (64, 64), dtype=torch.float16))
    asked = call(patcher, 4, (64, 64), dtype=torch.float16)
    wide = type(asked).of({name: tensor.float() for name, tensor in asked.named().items()})
    assert tiny.rms(made(asked), type(unet)(exact)(wide)) <= 2e-3


def test_residuals_with_gaps_reach_their_blocks(comfyui):
    """T2I adapters give lists of input residuals in which most are None."""
    from livediffusion.compiled.engine import Call, residuals

    patcher = tiny.model()
    asked = call(patcher, 2)
    few = torch.randn(1, 32, 8, 8)
    control = {"input": [None, few, None], "middle": [], "output": [None]}
    held = residuals(control, 2)
    assert list(held) == ["control_input_1"] and held["control_input_1"].shape[0] == 2
    again = Call.of({**asked.named(), **held})
    assert [t is None for t in again.control["input"]] == [False, True]
    made, unet = engine(patcher, again)
    assert tiny.rms(made(again), unet(again)) <= 1e-5
    expected = unet.module(
        asked.x, asked.timesteps, context=asked.context, transformer_options={},
        control={"input": [None, few, None]},
    )  # fmt: skip
    assert torch.equal(unet(again), expected)
    assert tiny.rms(expected, unet(asked)) > 0.01


def test_a_controlnet_of_another_model_is_refused(comfyui):
    """ComfyUI warns and goes on; the tracer would crash the process."""
    from livediffusion.compiled.engine import Call, Refused

    patcher = tiny.model()
    asked = Call.of({**call(patcher, 2).named(), "control_output_0": torch.zeros(2, 320, 8, 8)})
    with pytest.raises(Refused, match=r"control_output_0 .* made for another model"):
        engine(patcher, asked)


@pytest.mark.slow
def test_big_weights_lie_beside_the_graph(comfyui, tmp_path):
    """Past a limit, in a file of their own, as everything past 2 GB has to."""
    from livediffusion.compiled import onnx_export
    from livediffusion.compiled.ort import OnnxRuntime
    from livediffusion.host.models.unet import ComfyUNet

    patcher = tiny.model()
    unet = ComfyUNet(patcher.model.diffusion_model)
    sizes = []
    for limit in (1 << 30, 1 << 10):
        path = tmp_path / f"{limit}.onnx"
        exported = onnx_export.export(
            unet, call(patcher, 2), path, torch.float32,
            frozenset({onnx_export.ROWS}), external=limit,
        )  # fmt: skip
        made = OnnxRuntime()
        made.load(exported)
        asked = call(patcher, 3)
        assert tiny.rms(made(asked), unet(asked)) <= 1e-5
        sizes.append(path.stat().st_size)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"1073741824.onnx", "1024.onnx", "1024.onnx.data"}
    assert sizes[1] < sizes[0] / 2


@pytest.mark.slow
def test_static_files_are_static(comfyui, tmp_path):
    """What is not asked to be open is fixed: rows here, and size and tokens."""
    import onnx
    from livediffusion.compiled import onnx_export
    from livediffusion.host.models.unet import ComfyUNet

    patcher = tiny.model()
    unet = ComfyUNet(patcher.model.diffusion_model)
    path = tmp_path / "unet.onnx"
    onnx_export.export(unet, call(patcher, 4), path, torch.float32)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(str(path)).graph.input
    }
    assert shapes == {"x": [4, 4, 8, 8], "timesteps": [4], "context": [4, 77, 16]}


def test_what_cannot_be_exported_is_named(comfyui, tmp_path):
    from livediffusion.compiled.engine import Refused
    from livediffusion.host.models.unet import ComfyUNet

    with pytest.raises(Refused, match="Linear is no UNet"):
        ComfyUNet(torch.nn.Linear(2, 2)).traceable(torch.float32)
    patcher = tiny.model()
    module = patcher.model.diffusion_model
    module.out[2].weight_function = [lambda weight: weight]
    with pytest.raises(Refused, match=r"out\.2: some weights are not on the device"):
        ComfyUNet(module).traceable(torch.float32)


def test_a_failed_export_leaves_nothing_behind(comfyui, tmp_path, monkeypatch):
    from livediffusion.compiled import onnx_export
    from livediffusion.host.models.unet import ComfyUNet

    patcher = tiny.model()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OSError, match="no space"):
        onnx_export.export(
            ComfyUNet(patcher.model.diffusion_model), call(patcher, 1), tmp_path / "x.onnx",
            torch.float32,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_changes_nothing_of_the_model(comfyui):
    patcher = tiny.model()
    module = patcher.model.diffusion_model
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = [getattr(m, "comfy_cast_weights", None) for m in module.modules()]
    engine(patcher, call(patcher, 1, dtype=torch.float16))
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert flags == [getattr(m, "comfy_cast_weights", None) for m in module.modules()]
    assert module.dtype == torch.float32


def test_buffers_are_bound_once_for_each_shape():
    """Ticks of one shape come in and go out at the same addresses; what has left is not theirs."""
    base = tiny.model()
    asked = call(base, 2, tokens=8)
    made, unet = engine(base, asked)
    session, bindings = made._session, []

    class Watched:
        def io_binding(self):
            bindings.append(session.io_binding())
            return bindings[-1]

        def __getattr__(self, name):
            return getattr(session, name)

    made._session = Watched()
    outs, truth = [], []
    for i in range(6):
        # the prompt stays the same object for three calls, as in a stream
        asked = Call.of({**call(base, 2, tokens=8, seed=i).named(), "context": asked.context})
        if i == 3:
            asked = call(base, 2, tokens=8, seed=9)
        outs.append(made(asked))
        truth.append(unet(asked))
    assert len(bindings) == 1
    for out, wanted in zip(outs, truth, strict=True):
        assert tiny.rms(out, wanted) <= 1e-5
    for rows in (1, 3, 4, 5, 6, 2):
        other = call(base, rows, tokens=8)
        assert tiny.rms(made(other), unet(other)) <= 1e-5
    assert len(bindings) == 7 and len(made._bound) == 4  # two rows had gone
    made.release()
    assert not made._bound


def test_files_written_at_the_same_time(comfyui, tmp_path):
    """A node builds while an engine is made in a thread; torch's exporter knows one at a time."""
    from concurrent.futures import ThreadPoolExecutor

    import onnxruntime
    from livediffusion.compiled.onnx_export import export_network

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(40)))

        def forward(self, x):
            return self.module(x)

    with torch.inference_mode(False):
        nets = [Net().train(False) for _ in range(6)]
    x = torch.ones(1, 8)
    with ThreadPoolExecutor(6) as several:
        made = list(several.map(
            lambda i: export_network(nets[i], x, tmp_path / f"{i}.onnx"), range(6)
        ))  # fmt: skip
    for net, one in zip(nets, made, strict=True):
        out = onnxruntime.InferenceSession(str(one.path)).run(None, {"x": x.numpy()})[0]
        assert tiny.rms(torch.from_numpy(out), net(x)) <= 1e-5


class Stream:
    """A stream of CUDA's, as far as it says who waits for whom."""

    def __init__(self, handle, seen):
        self.cuda_stream, self._seen = handle, seen

    def wait_stream(self, other):
        self._seen.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


@pytest.mark.parametrize("now", [0, 7])
def test_on_cuda_it_runs_in_the_order_of_torchs_stream(now, comfyui, monkeypatch):
    """CUDA's default stream, which is ComfyUI's, is none to ONNX Runtime: it would take one of its
    own, and read its inputs before they are written."""
    import pathlib
    import types

    import onnxruntime
    from livediffusion.compiled import ort
    from livediffusion.compiled.onnx_export import Exported

    asked = call(patcher := tiny.model(), 2)
    plain, _ = engine(patcher, asked)
    seen, told = [], []

    class Session:
        def __init__(self, path, options, providers):
            told.extend(providers)
            self._real = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

        def __getattr__(self, name):
            return getattr(self._real, name)

        def run_with_iobinding(self, binding):
            seen.append("run")
            self._real.run_with_iobinding(binding)

    module = types.SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions, InferenceSession=Session
    )
    fill = ort.Knobs.fill
    monkeypatch.setattr(ort.OnnxRuntime, "_import", staticmethod(lambda: module))
    monkeypatch.setattr(ort, "missing", lambda device=None: None)
    monkeypatch.setattr(ort.Knobs, "fill", lambda *args: seen.append("fill") or fill(*args))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(9, seen))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(now, seen))
    made = ort.OnnxRuntime()
    made.load(Exported(pathlib.Path(plain._folder.name) / "unet.onnx", {}), "cuda:1")
    (name, own), other = told
    assert (name, other) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert own == {"device_id": 1, "user_compute_stream": "9"}
    for _ in range(2):
        assert torch.equal(made(asked), plain(asked))
    mine = ["fill", f"9 waits for {now}", "run", f"{now} waits for 9"]
    assert [step for step in seen if step != "fill"] == [*mine[1:]] * 2
    assert seen[:4] == mine and seen.index("fill", 4) < seen.index(mine[1], 4)
