"""The benchmarks measure what they say: same networks, same work, counters that count. No times."""

import json
import pathlib
import sys

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

FOLDER = str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks")
SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def folder(comfyui):
    """benchmarks/ importable, as for the scripts in it."""
    sys.path.insert(0, FOLDER)
    with torch.inference_mode():
        yield
    sys.path.remove(FOLDER)


@pytest.fixture(scope="module", params=["sd15", "sdxl-turbo"])
def kit(request):
    from networks import published

    return published(request.param, SIZE, tiny=True)


@pytest.mark.parametrize("name", ["sd15", "sd-turbo", "sdxl-turbo"])
def test_both_sides_run_the_same_networks(name):
    from networks import published

    assert max(published(name, SIZE, tiny=True).check().values()) < 1e-5


def test_the_embedded_model_is_the_same_behind_its_adapters():
    """As diffusers and the public class take it; they do the same work, and give pictures."""
    import rivals
    from networks import embedded

    own = embedded(64)
    assert max(own.check().values()) < 1e-4
    assert rivals.apart(own, 2, "full") < 1e-3
    fed = rivals.pictures(own)
    for make in (rivals.Public, rivals.AutoPipeline, rivals.Ours, rivals.Floor):
        side = make(own, 2, "off")
        out = [side.frames(fed) for _ in range(3)][-1]
        assert out.shape == fed.shape and out.std() > 1, side.name


def test_another_network_is_seen(kit):
    from networks import Disagree

    weight = next(kit.unet.mid_block.parameters())
    before = weight.clone()
    weight.add_(1.0)
    try:
        with pytest.raises(Disagree, match="the UNets differ"):
            kit.check()
    finally:
        weight.copy_(before)


@pytest.mark.parametrize("mode", ["off", "self-negative", "onetime-negative", "full"])
def test_every_side_gives_pictures(kit, mode):
    import rivals

    fed = rivals.pictures(kit)
    every = rivals.Public, rivals.AutoPipeline, rivals.ComfySampler, rivals.Ours, rivals.Floor
    able = [make(kit, 2, mode) for make in every if mode in make.modes]
    assert len(able) >= 3
    for side in able:
        out = [side.frames(fed) for _ in range(3)][-1]
        assert out.shape == fed.shape and out.dtype == np.uint8, side.name
        assert out.std() > 1, side.name


@pytest.mark.parametrize("mode", ["off", "self-negative", "onetime-negative", "full"])
def test_the_public_class_does_the_same_work(kit, mode):
    """With the same noise its latents are ours, and only then."""
    import rivals

    assert rivals.apart(kit, 2, mode) < 1e-4
    assert rivals.apart(kit, 2, mode, rivals.SEED + 1) > 1e-2


def test_comfyui_by_its_queue_does_as_its_sampler(kit):
    import rivals

    fed, queue = rivals.pictures(kit), rivals.ComfyQueue(kit, 2)
    try:
        a = queue.frames(fed)
    finally:
        queue.close()
    b = rivals.ComfySampler(kit, 2).frames(fed)
    assert np.abs(a.astype(int) - b).max() <= 1


def test_operations_of_the_public_class():
    """What the project's notes counted in it; a counter that misses or adds some shows here."""
    import bench
    import measure
    import rivals

    kit = bench.without_network(64)
    latents, found = torch.randn(1, *kit.latent), {}
    for mode in bench.OPS:
        side = rivals.Public(kit, 4, mode)
        for _ in range(4):
            side.step(latents)
        found[mode] = sum(measure.ops(lambda side=side: side.step(latents)).values())
    assert found == {mode: theirs for mode, (_, theirs) in bench.OPS.items()}


def test_views_are_no_operations_and_composed_ones_are_taken_apart():
    import measure

    x = torch.ones(2, 3)
    assert not measure.ops(lambda: x.view(3, 2).T[0].unsqueeze(0).expand(4, 3))
    assert not measure.ops(lambda: torch.empty(3))
    assert measure.ops(lambda: x.add_(1)) == {"add_": 1}
    assert measure.ops(lambda: x.T.reshape(6)) == {"clone": 1}
    assert measure.ops(lambda: torch.nn.functional.linear(x, x, x[:, 0])) == {"addmm": 1}


def test_turns(capsys, tmp_path):
    """A side that fails is named and the others go on; both measurements see every order."""
    import measure

    calls = []

    def broken():
        raise ValueError("no such thing\nat all")

    ways = {"a": lambda: calls.append("a"), "broken": broken, "b": lambda: calls.append("b")}
    times = measure.in_turns(ways, measure.Device("cpu"), 8, 1)
    assert times["broken"].failed == "ValueError: no such thing"
    assert calls == ["a", "b", *"abab", *"baba", *"abab", *"baba"]
    assert len(times["a"].ms) == 8 and times["a"].spread >= 0
    assert measure.slope({1: 2.0, 10: 20.0, 100: 200.0}) == pytest.approx(1)
    assert measure.slope({1: 5.0, 10: 5.0}) == pytest.approx(0)
    assert not measure.Bar("x", 1.1, 1.0).ok and measure.Bar("x", 1.1, 1.2, 1.0).ok
    report = measure.Report(tmp_path / "r.json", {})
    with report.part("odd"):
        broken()
    report.add("fine", [{"a": 1.0}])
    assert json.loads((tmp_path / "r.json").read_text())["failed"].keys() == {"odd"}
    assert "odd FAILED: ValueError: no such thing" in capsys.readouterr().out


def test_blocks():
    """Each side runs by itself for a block; the rounds alternate; time that is up is told."""
    import blocks
    import measure

    calls, done = [], {"a": 0}

    def of(name):
        def frame():
            calls.append(name)
            done["a"] += name == "a"

        return blocks.Way(frame, frame, {"done": lambda: done["a"]} if name == "a" else {})

    def broken():
        raise ValueError("no such thing")

    ways = {"a": of("a"), "broken": blocks.Way(broken, broken), "b": of("b")}
    times = blocks.in_blocks(ways, measure.Device("cpu"), 2 * 17, 2)
    a, b = ["a"] * (2 * (2 + 17)), ["b"] * (2 * (2 + 17))
    assert calls == [*"aabb", *a, *b, *b, *a]
    row = times["a"].row()
    assert row["frames"] == 34 and row["done"] == "68 of 68"
    assert len(times["b"].medians) == len(times["b"].flowing) == 2
    assert times["broken"].row() == {"failed": "ValueError: no such thing"}
    none = blocks.in_blocks({"a": of("a")}, measure.Device("cpu"), 34, 2, 0.0, 0.0)
    assert none["a"].row() == {"failed": blocks.NO_TIME}
    one = blocks.in_blocks({"a": of("a")}, measure.Device("cpu"), 340, 2, 0.0)
    assert one["a"].row()["frames"] == 17


def test_the_first_warning_of_torch_is_no_wait(monkeypatch):
    import warnings

    import measure

    def mode(to):
        if to == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations", stacklevel=1,
            )  # fmt: skip

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    device = measure.Device("cuda")
    assert device.syncs(lambda: None) == 0
    told = "called a synchronizing CUDA operation"
    assert device.syncs(lambda: [warnings.warn(told, stacklevel=1) for _ in range(3)]) == 3


def test_onnx_runtime_without_cuda_is_missing_on_a_gpu(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    import engines

    gpu, offers = torch.device("cuda"), ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offers)
    assert "onnxruntime-gpu" in engines.without_cuda("onnxruntime", gpu)
    assert engines.without_cuda("onnxruntime", torch.device("cpu")) is None
    assert engines.without_cuda("cudagraph", gpu) is None
    offers.append("CUDAExecutionProvider")
    assert engines.without_cuda("onnxruntime", gpu) is None


def test_our_frames_stay_prepared_in_blocks(kit):
    """Clones of one model that take turns frame by frame are loaded for each frame."""
    import blocks
    import measure
    import replaying
    import rivals
    import sides

    fed, device = rivals.pictures(kit), measure.Device("cpu")
    made = {
        "eager": rivals.Ours(kit, 1),
        "graph": rivals.Ours(kit, 1, engine="graph", recording=replaying.Replaying),
    }
    others = {"theirs": rivals.ComfySampler(kit, 1)}
    ways = {name: sides.way(side, fed) for name, side in {**made, **others}.items()}
    times = blocks.in_blocks(ways, device, 6, 4)
    assert times["eager"].row()["prepared"] == times["graph"].row()["prepared"] == "12 of 12"
    assert times["graph"].row()["by the engine"] == "12 of 12"
    before = made["graph"].prepared
    measure.in_turns({name: way.frame for name, way in ways.items()}, device, 6, 0)
    assert made["graph"].prepared == before


def a_bench(tmp_path, monkeypatch, **more):
    """Of so few frames that every part takes seconds."""
    import blocks
    import gpu
    import measure
    import replaying

    report = measure.Report(tmp_path / "gpu.json", measure.machine())
    told = {"deadline": float("inf"), "rehearse": True, "recording": replaying.Replaying, **more}
    monkeypatch.setattr(blocks, "DROP", 1)
    return gpu.Bench(report, measure.Device("cpu"), 2, 4, **told)


def told(tmp_path):
    return json.loads((tmp_path / "gpu.json").read_text())


def test_the_gpu_command_rehearsed(tmp_path, monkeypatch):
    """Side by side: every side runs or is told by name, and ticks are recorded."""
    import best
    import sides
    from networks import published

    kit = published("sd15", SIZE, tiny=True)
    # tracing takes half a minute; --rehearse does it
    monkeypatch.setattr(best, "compiled", lambda kit, backend: kit)
    bench = a_bench(tmp_path, monkeypatch)
    cells = [(2, "self-negative", 1), (2, "off", 2)]
    sides.agree(bench, kit, cells)
    sides.side_by_side(bench, kit, cells)
    sides.at_their_best(bench, kit, cells)
    written = told(tmp_path)
    agreed = written[f"{kit.name}: our latents against the public class's"]
    assert [(row["n"], row["mode"]) for row in agreed] == [(2, "self-negative"), (2, "off")]
    assert all(row["relative RMS"] < 1e-4 for row in agreed)
    names = [f"{kit.name}: side by side, n = {n}, {mode}, F = {f}" for n, mode, f in cells]
    names.append(f"{kit.name}: others at their best, n = 2, self-negative, F = 1")
    rows = [{"cell": name, **row} for name in names for row in written[name]]
    found = {(row["cell"], row["side"]): row for row in rows}
    assert len(found) == len(rows) == 6 + 9 + 4
    # its documented argument for it does not work with several steps
    failed = {key for key, row in found.items() if "failed" in row}
    assert failed == {(names[1], "streamdiffusion 0.1.1")}
    for (_, side), row in found.items():
        if side in ("LiveDiffusion, graph", "LiveDiffusion, cudagraph"):
            assert row["recorded"] == 1 and "fell back" not in row
            assert row["by the engine"] == row["prepared"] == "4 of 4"
    assert bench.device.missing and not bench.report.failed


def test_what_there_is_no_time_for_is_told(tmp_path, monkeypatch):
    import gpu
    import sides
    from networks import published

    kit = published("sd15", SIZE, tiny=True)
    bench = a_bench(tmp_path, monkeypatch, deadline=0.0)
    sides.side_by_side(bench, kit, sides.CELLS)
    bench.part("profile", gpu.profile, kit)
    written = told(tmp_path)
    skipped = written[gpu.SKIPPED]
    assert len(skipped) == len(sides.CELLS) + 1 and skipped[-1] == "profile"
    assert not [name for name in written if "side by side" in name]


def test_each_step_of_the_ladder_is_what_it_says(tmp_path, monkeypatch):
    """Every one is recorded or told; those with recorded halves have them."""
    import best
    import ladder
    from networks import published

    kit = published("sd-turbo", SIZE, tiny=True)
    bench = a_bench(tmp_path, monkeypatch)
    # torch.compile traces for long; --rehearse does it
    steps = [rung for rung in ladder.LADDER if rung.engine != "inductor"]
    steps = [*steps[:2], *steps[-2:]]
    monkeypatch.setattr(ladder, "LADDER", steps)
    monkeypatch.setattr(ladder, "SLOTS", (1,))
    ladder.ladder(bench, kit)
    rows = told(tmp_path)[f"{kit.name}: step by step, n = 1"]
    assert [row["step"] for row in rows] == [rung.name for rung in steps]
    for row, rung in zip(rows, steps, strict=True):
        assert "failed" not in row and "fell back" not in row, row
        assert row["recorded"] == (rung.engine != "eager")
    own = best.compiled_vae(kit, bench.recording)
    bench.ours(own, 1).frames(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_recorded_stage_gives_what_the_autoencoder_gives(kit):
    import best
    import replaying
    from networks import relative

    own, before = best.compiled_vae(kit, replaying.Replaying), replaying.Replaying.made
    for size in (SIZE, 2 * SIZE):
        for _ in range(3):
            picture = torch.rand(1, size, size, 3)
            latent = kit.vae.encode(picture)
            assert relative(own.vae.encode(picture), latent) <= 1e-5
            assert relative(own.vae.decode(latent), kit.vae.decode(latent)) <= 1e-5
    assert replaying.Replaying.made == before + 4


def test_kernels_are_told_by_what_they_are_for():
    import kinds

    names = {
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>": "layout",
        "sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc": "convolution, GEMM",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT": "convolution, GEMM",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": "attention",
        "void at::native::RowwiseMomentsCUDAKernel<c10::Half, float, int>": "norm",
        "_group_norm_kernel": "norm",
        "_stream_step_kernel": "ours",
        "Memcpy DtoH (Device -> Pinned)": "copy",
        "void at::native::vectorized_elementwise_kernel<4, silu>": "elementwise",
        "something": "other",
    }
    assert {name: kinds.kind(name) for name in names} == names
    every = [kinds.Spent(name, 1.0, 2.0) for name in names]
    rows = kinds.by_kind(every)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["kernels/frame"] for row in rows) == 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.ones(64, 64) @ torch.ones(64, 64)
    assert kinds.kind(kinds.spent(seen, 1, False)[0].name) in ("convolution, GEMM", "other")


def test_the_floors_are_what_the_model_gives():
    """The published arithmetic and operations of a forward, and the least time of each."""
    import floors

    works = floors.works("sd-turbo", 1)
    flops = sum(2 * w.m * w.n * w.k * w.count * (1 + w.attention) for w in works)
    assert len(works) == 314 and flops == pytest.approx(804e9, rel=1e-3)
    for name, hardware in floors.KNOWN.items():
        least = 1000 * sum(work.seconds(hardware) for work in works)
        assert least == pytest.approx(floors.floors("sd-turbo", f"NVIDIA {name}")[1], rel=5e-3)
    assert floors.floors("sdxl-turbo", "NVIDIA H100 80GB HBM3")[4] == pytest.approx(9.32)
    assert floors.floors("sd15", "NVIDIA A10") == {}


def test_late_pictures_are_told_by_their_numbers():
    """Those that came again or in another order are counted, a still picture is not."""
    import ends_late

    seen, other = ends_late.Seen(), ends_late.Seen()
    sent = {number: number / 10 for number in range(100)}
    for number in range(100):
        seen.add(number, sent[number] + 0.05)
        if number % 2:
            other.add(number, sent[number] + 0.2)
    for number in (99, 99, 40, None):
        seen.add(number, 20.0)
    assert seen.wrong == 2 and len(seen) == 100
    both = ends_late.late(sent, seen, other)
    assert len(both) == 50 - ends_late.WARM and max(both) == pytest.approx(50)
    row = ends_late._row("x", both, 25.0, seen)
    assert (row["ms"], row["added"], row["x WebSocket"]) == (50.0, 25.0, 2.0)


def test_a_search_that_takes_too_long_is_not_enough():
    import schedules

    good = {"ratio": 0.8, "ratio unseen": 0.85, "flops": 0.74, "cpu": 1200.0}
    assert schedules.enough(good, 0.25)
    for bad in ({"cpu": 1201.0}, {"ratio": 0.9}, {"ratio unseen": 0.9}, {"flops": 0.76}):
        assert not schedules.enough(good | bad, 0.25)
