"""The benchmark of calm measures what it says: motion is known, and figures see what they should.

No times, and no bars of the embedded model: `run.py bench --only calm` has those.
"""

import pathlib
import sys
import types

import pytest
import torch

# the same photographs, figures and model on every ComfyUI
pytestmark = [pytest.mark.comfy, pytest.mark.slow]

FOLDER = str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks")
HALVES = ("tuning", "judged")


@pytest.fixture(scope="module", autouse=True)
def folder(comfyui):
    """benchmarks/ importable, as for the scripts in it."""
    from livediffusion.demo import pictures

    if pictures.installed() is None:
        pytest.skip("the template packages of this ComfyUI are of other versions")
    sys.path.insert(0, FOLDER)
    with torch.inference_mode():
        yield
    sys.path.remove(FOLDER)


@pytest.fixture(scope="module")
def scene():
    """A photograph, [1, 3, 96, 96]."""
    import calm_clips

    name = calm_clips.HALVES["tuning"][0]
    return calm_clips.photograph(name)[:, :, 100:196, 100:196]


def flowing(dx, dy, side=96):
    return torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1).expand(1, 2, side, side)


def error(out, flow, seen=None):
    import calm_figures

    if seen is None:
        seen = torch.ones(len(flow), 1, *out.shape[-2:])
        seen[..., :8, :] = seen[..., -8:, :] = seen[..., :8] = seen[..., -8:] = 0
    return calm_figures.warp_errors(out, flow, seen)[0]


@pytest.mark.parametrize("half", HALVES)
def test_the_flow_of_every_clip_maps_a_frame_to_the_next(half):
    import calm_clips

    for plan in calm_clips.plans(half):
        clip = calm_clips.Clip(plan, 0, frames=2, tail=0)
        right = error(clip.clean, clip.flow, clip.seen)
        wrong = [error(clip.clean, clip.flow + flowing(dx, dy, 256), clip.seen)
                 for dx, dy in ((1, 0), (0, 1))]  # fmt: skip
        assert right < 2.5 and right < 0.5 * min(wrong), (plan.name, right, wrong)
        assert clip.seen.float().mean() > 0.85
        if len(plan.layers) > 1:
            # what was hidden is left out, and would tell
            assert error(clip.clean, clip.flow, torch.ones_like(clip.seen)) > right


def test_no_scene_is_in_both_halves_and_all_are_held_out():
    import calm_clips
    from livediffusion.demo import pictures

    every = {half: {layer.photo for moves in (True, False)
                    for plan in calm_clips.plans(half, moves) for layer in plan.layers}
             | {calm_clips.FILMS[half]} for half in HALVES}  # fmt: skip
    for names in every.values():
        assert {pictures.stem(name) for name in names} <= {
            pictures.stem(name) for name in pictures.held_out()
        }
    tuned, judged = ({pictures.stem(name) for name in names} for names in every.values())
    assert not tuned & judged
    for half in HALVES:
        looks = [plan.look for plan in calm_clips.plans(half)]
        assert sorted(looks) == sorted(calm_clips.LOOKS)
    pairs = [{(p.name, p.look) for p in calm_clips.plans(half)} for half in HALVES]
    assert not pairs[0] & pairs[1]


def test_a_perfect_warp_is_no_error_and_another_is(scene):
    rolled = torch.cat([scene, scene.roll((3, -5), (2, 3))])
    assert error(rolled, flowing(5, -3)) < 1e-3
    assert error(rolled, flowing(4, -3)) > 1
    assert error(rolled, flowing(0, 0)) > 1
    # in bytes
    assert error(torch.cat([scene * 0, scene * 0 + 10 / 255]), flowing(0, 0)) == pytest.approx(10)


def test_flicker_is_the_deviation_over_time_in_bytes(scene):
    import calm_figures

    assert calm_figures.flicker(scene.expand(9, -1, -1, -1)) == 0
    noise = torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert calm_figures.flicker(0.5 + 0.02 * noise) == pytest.approx(5.1, rel=0.01)


def test_what_calm_may_cost_shows(scene):
    """A blur in sharpness, a lag in layout, another look in look."""
    import calm_clips
    import calm_figures
    from livediffusion.demo import filters

    plan = calm_clips.Plan("pan", "comic", calm_clips.plans("tuning")[1].layers)
    clip = calm_clips.Clip(plan, 0, frames=4, tail=0)
    off = torch.cat([clip.filtered(t) for t in range(3)])
    found = calm_figures.measure(off, clip, 0, off)
    assert found["sharpness"] == pytest.approx(1) and found["look"] > 60
    assert calm_figures.measure(filters.blur(off, 1.0), clip, 0, off)["sharpness"] < 0.8
    assert calm_figures.measure(off[[0, 0, 1]], clip, 0, off)["layout"] < found["layout"] - 0.01
    assert calm_figures.measure(off.flip(1), clip, 0, off)["look"] < 30


def test_a_camera_adds_two_percent_in_steps_of_a_byte():
    import calm_clips

    clip = calm_clips.Clip(calm_clips.plans("tuning", False)[2], 3, frames=4, tail=0)
    assert torch.equal(clip.clean[0], clip.clean[3]) and clip.flow.abs().max() == 0
    gone = (clip.noisy - clip.clean)[(clip.clean > 0.1) & (clip.clean < 0.9)]
    assert float(gone.std()) == pytest.approx(0.02, rel=0.02) and abs(float(gone.mean())) < 2e-4
    assert float((clip.noisy * 255).frac().minimum(1 - (clip.noisy * 255).frac()).max()) < 1e-3
    assert not torch.equal(clip.noisy[0], clip.noisy[1])


@pytest.mark.parametrize("pixels", [False, True])
def test_noise_with_the_scene_is_white_and_moves_exactly(pixels):
    import calm_clips
    import calm_ways

    model = types.SimpleNamespace(latent_format=types.SimpleNamespace(latent_channels=48))
    kit = types.SimpleNamespace(model=types.SimpleNamespace(model=model), settings={"steps": 2})
    layer = calm_clips.Layer("none", lambda t: calm_clips.window(4 * t, 8 * t))
    clip = calm_clips.Clip(calm_clips.Plan("pan", "photo", (layer,)), 0)
    clip.covers = lambda t: [torch.ones(1, 1, 256, 256)]
    at = calm_ways.with_the_scene(kit, clip, pixels)
    before, after = (at(t) for t in (0, 1))
    for k in range(2):
        a, b = before[k], after[k]
        assert torch.allclose(a[:, 2:, 1:], b[:, :-2, :-1], atol=1e-5)
        assert float(a.std()) == pytest.approx(1, abs=0.01) and abs(float(a.mean())) < 0.01
        assert abs(float((a[:, 1:] * a[:, :-1]).mean())) < 0.01


def test_frames_are_those_of_the_clip_workflow_and_told_by_number():
    """Live, frame by frame, a stream of its own: the same pictures as the clip mode's."""
    import calm_clips
    import calm_ways
    from livediffusion.host.sampling.stream import Settings, Stream
    from livediffusion.nodes import schedules

    kit, given = calm_ways.Kit(), []
    plan = calm_clips.plans("tuning")[1]
    clip = calm_clips.Clip(plan, 0, frames=4, tail=1)

    def told(kit, clip):
        return lambda t, x: given.append(t) or x

    out = kit.run(clip, calm_ways.Way("w", before=told, after=told))
    assert given == [0, 1, 0, 2, 1, 3, 2, 4, 3] and len(out) == 4
    sigmas = schedules.LiveStrength.execute(kit.model, 2, 0.5, "uniform t").args[0]
    latents = Stream().run(
        kit.guider(kit.model, clip.look), kit.vae.encode(clip.noisy.movedim(1, -1)),
        Settings(tuple(sigmas.tolist()), drain=True),
    )  # fmt: skip
    assert torch.allclose(out, kit.vae.decode(latents).movedim(-1, 1)[:4], atol=1e-4)


def test_operations_are_those_that_the_layout_has():
    """SD-Turbo's at 512 x 512, as published; what is added, as the project counted it."""
    import calm_cost
    from livediffusion.engine.coherence.neighbours import Future, Memory
    from livediffusion.host.models.coherence import Coherence

    unet = calm_cost.turbo()
    base = calm_cost.forward(unet)
    assert base == pytest.approx(804e9, rel=1e-3)
    asked = {"all": (0.15, 0.46), "all but the finest": (0.02, 0.06)}
    for levels, counted in asked.items():
        for n, share in zip((2, 4), counted, strict=True):
            more = calm_cost.added(unet, Coherence(Future(levels)), n) / base
            assert more == pytest.approx(share, abs=0.005), (levels, n)
    one, two = (calm_cost.added(unet, Coherence(None, Memory(frames=m, bank="queue", fuse=0.0)), 4)
                for m in (1, 2))  # fmt: skip
    # a keyframe in the bank is as a neighbour in flight; two are two
    ahead = calm_cost.added(unet, Coherence(Future(Memory().levels)), 2)
    assert one == pytest.approx(ahead) and two == pytest.approx(2 * one)


def test_tables_compare_with_off():
    import calm
    import calm_figures

    assert calm_figures.geometric([1.0, 4.0]) == pytest.approx(2)
    same = {"look": 15.0, "layout": 0.0, "sharpness": 1.0}
    clips = [{"clip": "a", **same, "warp error": 4.0, "look": 20.0, "layout": 0.5},
             {"clip": "b", **same, "flicker": 2.0, "look": 10.0, "layout": -0.5}]  # fmt: skip
    half = [{**own, **{k: own[k] / 2 for k in ("warp error", "flicker") if k in own}}
            for own in clips]  # fmt: skip
    rows = calm.table({"off": clips, "half": half})
    assert rows[0]["warp error / off"] == rows[0]["flicker / off"] == 1
    assert rows[1]["warp error / off"] == rows[1]["flicker / off"] == 0.5
    assert rows[1]["look"] == 15 and rows[1]["layout"] == 0
    told = calm.markdown(rows).splitlines()
    assert len(told) == 4 and len({line.count("|") for line in told}) == 1


def test_the_page_can_be_written_again(scene, tmp_path):
    import calm
    import calm_sheets

    page = tmp_path / "coherence.md"
    page.write_text((calm.ROOT / "docs" / page.name).read_text(encoding="utf-8"), encoding="utf-8")
    films = [{name: calm_sheets.kept(scene.expand(3, -1, -1, -1)) for name in ("camera", "off")}]
    written = []
    for value in (1.0, 0.5, 0.5):
        calm.write([{"way": "off", "warp error": value}], films, tmp_path)
        written.append(page.read_text(encoding="utf-8"))
    assert "| off | 1.00 |" in written[0] and "| off | 1.00 |" not in written[1]
    assert written[1] == written[2] and "| off | 0.50 |" in written[1]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"coherence.md", "coherence.webp", "coherence.jpg"}
    assert all(f"]({name})" in written[2] for name in names - {page.name})


def test_sheets_and_films(scene, tmp_path):
    import calm_sheets
    from PIL import Image

    frames = torch.cat([scene.roll(t, 3) for t in range(5)])
    rows = {"camera": frames, "off": frames.flip(1)}
    seen = {}
    for name, flow in (("still", None), ("moves", flowing(-1, 0).expand(4, -1, -1, -1))):
        calm_sheets.sheet(rows, tmp_path / "s.png", 32, flow)
        with Image.open(tmp_path / "s.png") as whole:
            assert whole.size == (150 + 6 * 32, 14 + 2 * 32)
            seen[name] = whole.crop((150 + 4 * 32 + 4, 18, 150 + 5 * 32 - 4, 42)).getextrema()
    # what only moves does not change beside its motion
    assert max(high for _, high in seen["still"]) > 60
    assert max(high for _, high in seen["moves"]) <= 2
    size = calm_sheets.film([{k: calm_sheets.kept(x) for k, x in rows.items()}] * 2,
                            tmp_path / "f.webp", 32)  # fmt: skip
    with Image.open(tmp_path / "f.webp") as film:
        assert film.n_frames == 8 and film.size == (64, 14 + 64)
    assert size == (tmp_path / "f.webp").stat().st_size
