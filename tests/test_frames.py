"""Encode, decode and the similarity filter as nodes, in the real ComfyUI."""

import types
import uuid

import pytest
import torch

pytestmark = pytest.mark.comfy

_VAE = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():  # as ComfyUI's executor runs nodes
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def frames_nodes():
    from livediffusion.nodes import frames

    return frames


@pytest.fixture(scope="module")
def vae():
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = AutoencoderKL(**_VAE).state_dict()
        for weight in weights.values():  # ComfyUI leaves them as memory had them
            torch.nn.init.normal_(weight, std=0.5 / max(weight[0].numel(), 1) ** 0.5)
    vae = comfy.sd.VAE(sd=weights, config={"params": _VAE})
    return vae


def pictures(n=1, h=32, w=32, channels=3, seed=0):
    return torch.rand(n, h, w, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape",
    [(1, 32, 32, 3), (3, 32, 48, 3), (1, 37, 35, 3), (2, 32, 32, 4)],
    ids=["one", "batch", "cropped", "alpha"],
)
def test_encode_equals_the_stock_node(frames_nodes, vae, shape):
    import nodes

    pixels = pictures(*shape)
    ours = frames_nodes.LiveEncode.execute(pixels, vae).args[0]
    stock = nodes.VAEEncode().encode(vae, pixels)[0]
    assert ours.keys() == stock.keys()
    assert ours["samples"].isfinite().all() and ours["samples"].std() > 0
    assert torch.equal(ours["samples"], stock["samples"])


@pytest.mark.parametrize("n", [1, 3])
def test_decode_equals_the_stock_node(frames_nodes, vae, n):
    import nodes

    latent = {"samples": torch.randn(n, 4, 4, 6, generator=torch.Generator().manual_seed(n))}
    ours = frames_nodes.LiveDecode.execute(latent, vae).args[0]
    assert torch.equal(ours, nodes.VAEDecode().decode(vae, latent)[0])
    assert ours.shape == (n, 32, 48, 3)
    assert ours.isfinite().all() and ours.std() > 0


def test_results_stay_on_the_vaes_device_and_the_vae_as_it_was(frames_nodes, vae, monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(vae, "output_device", meta)  # where ComfyUI would bring results
    samples = frames_nodes.LiveEncode.execute(pictures(), vae).args[0]
    image = frames_nodes.LiveDecode.execute(samples, vae).args[0]
    assert samples["samples"].device == image.device == vae.device
    assert vae.output_device == meta


# --- the filter through ComfyUI's executor -------------------------------------------------------


@pytest.fixture
def graph(monkeypatch):
    """camera -> encode -> sample -> decode -> filter -> view, with every call counted."""
    import asyncio

    import execution
    from livediffusion.nodes.frames import LiveSimilarityFilter

    import nodes

    world = types.SimpleNamespace(
        calls={"encode": 0, "sample": 0, "decode": 0}, shown=[], skipped=[], frame=None, fails=False
    )

    def node(name, inputs, returns, function, output=False):
        members = {
            "INPUT_TYPES": classmethod(lambda cls: {"required": inputs}),
            "RETURN_TYPES": returns,
            "FUNCTION": "go",
            "CATEGORY": "test",
            "OUTPUT_NODE": output,
            "go": lambda self, **kwargs: function(**kwargs),
        }
        if not inputs:
            members["IS_CHANGED"] = classmethod(lambda cls: float("nan"))
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, type(name, (), members))

    def stage(name):
        def run(x, scale=0):
            if world.fails:
                raise RuntimeError("out of luck")
            world.calls[name] += 1
            return (x,)

        return run

    def view(image, skipped):
        world.shown.append(image)
        world.skipped.append(skipped)
        return {}

    node("TestCamera", {}, ("IMAGE",), lambda: (world.frame,))
    node("TestEncode", {"x": ("IMAGE",)}, ("LATENT",), stage("encode"))
    node("TestSample", {"x": ("LATENT",), "scale": ("INT",)}, ("LATENT",), stage("sample"))
    node("TestDecode", {"x": ("LATENT",)}, ("IMAGE",), stage("decode"))
    node("TestView", {"image": ("IMAGE",), "skipped": ("BOOLEAN",)}, (), view, output=True)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "LiveSimilarityFilter", LiveSimilarityFilter)

    server = types.SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *args: None)
    executor = execution.PromptExecutor(
        server, cache_args={"ram": 0.0, "ram_inactive": 0.0, "lru": 0}
    )
    extra = {"extra_pnginfo": {"workflow": {"id": str(uuid.uuid4())}}}

    def run(frame, scale=0, **settings):
        world.frame = frame
        values = {"threshold": 0.98, "max_skip": 10, "settle": 3, "measure": "centred", "seed": 0}
        prompt = {
            "1": ("TestCamera", {}),
            "2": ("TestEncode", {"x": ["1", 0]}),
            "3": ("TestSample", {"x": ["2", 0], "scale": scale}),
            "4": ("TestDecode", {"x": ["3", 0]}),
            "5": (
                "LiveSimilarityFilter",
                {"image": ["1", 0], "processed": ["4", 0]} | values | settings,
            ),
            "6": ("TestView", {"image": ["5", 0], "skipped": ["5", 1]}),
        }
        prompt = {k: {"class_type": name, "inputs": inputs} for k, (name, inputs) in prompt.items()}
        valid = asyncio.run(execution.validate_prompt("p", prompt, None))
        assert valid[0], valid
        executor.execute(prompt, "p", extra, ["6"])
        return executor.success

    world.run = run
    return world


def counts(world):
    return [world.calls[stage] for stage in ("encode", "sample", "decode")]


def test_a_skipped_frame_costs_no_call_at_all(graph):
    still = pictures(h=64, w=64)
    for _ in range(4):  # the first frame, and three that empty the stream batch
        assert graph.run(still.clone())
    assert counts(graph) == [4, 4, 4]
    for _ in range(10):
        assert graph.run(still.clone())
    assert counts(graph) == [4, 4, 4]
    assert graph.skipped == [False] * 4 + [True] * 10
    assert all(shown is graph.shown[3] for shown in graph.shown[4:])
    assert graph.run(still.clone())  # the one after max_skip
    assert counts(graph) == [5, 5, 5]
    assert graph.skipped[-1] is False


def test_a_changed_frame_runs_once_and_is_shown(graph):
    for seed in range(6):
        frame = pictures(h=64, w=64, seed=seed)
        assert graph.run(frame)
        assert counts(graph) == [seed + 1] * 3
        assert graph.shown[-1] is frame
    assert not any(graph.skipped)


def test_a_setting_changed_while_nothing_moves_comes_through(graph):
    still = pictures(h=64, w=64)
    for _ in range(8):
        graph.run(still.clone())
    assert graph.skipped[-1] is True
    for _ in range(6):
        graph.run(still.clone(), scale=7)
    assert graph.skipped[-6:] == [False] * 4 + [True] * 2
    assert counts(graph) == [8, 8, 8]


def test_a_failed_frame_does_not_count_as_processed(graph):
    still = pictures(h=64, w=64)
    for _ in range(6):
        graph.run(still.clone())
    graph.fails = True
    assert not graph.run(pictures(h=64, w=64, seed=1))
    graph.fails = False
    assert graph.run(pictures(h=64, w=64, seed=1))
    assert graph.skipped[-1] is False


def test_streams_of_two_workflows_do_not_mix(frames_nodes):
    import comfy_api.latest._io as _io

    def decide(workflow, image):
        hidden = {
            _io.Hidden.unique_id: "5",
            _io.Hidden.extra_pnginfo: {"workflow": {"id": workflow}},
        }
        clone = frames_nodes.LiveSimilarityFilter.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
        values = (image, 0.98, 10, 0, "centred", 0)
        wants = clone.check_lazy_status(*values)
        return clone.execute(*values, processed=image if wants else None).args[1]

    still, one, two = pictures(h=64, w=64), str(uuid.uuid4()), str(uuid.uuid4())
    assert [decide(one, still) for _ in range(2)] == [False, True]
    assert [decide(two, still) for _ in range(2)] == [False, True]
