"""The benchmarks of reuse and patchwork measure what they say: what was spent, and how far pictures
are off.

No times, and no bars of the embedded model: `run.py bench --only reuse` and `patchwork` have those.
"""

import pathlib
import sys

import pytest
import torch

# the same figures and model on every ComfyUI
pytestmark = [pytest.mark.comfy, pytest.mark.slow]

FOLDER = str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def folder(comfyui):
    """benchmarks/ importable, as for the scripts in it."""
    sys.path.insert(0, FOLDER)
    with torch.inference_mode():
        yield
    sys.path.remove(FOLDER)


@pytest.fixture(scope="module")
def kit():
    import calm_ways

    return calm_ways.Kit(steps=4)


@pytest.fixture(scope="module")
def clip():
    import calm_clips

    return calm_clips.Clip(calm_clips.Plan("none", "ink", (), False), 0)


@pytest.fixture(scope="module")
def pictures():
    """A smooth scene that moves, [22, 3, 64, 64]."""
    waves = torch.sin(torch.linspace(0, 9, 96))
    scene = 0.5 + 0.4 * waves[:, None] * waves
    return torch.stack([scene[t : t + 64, 16:80].expand(3, -1, -1) for t in range(22)])


def test_watching_a_run_changes_nothing(kit, clip, pictures):
    """A hook on the network would have its frames sampled one by one."""
    import reuse

    for way in (reuse.OFF, reuse.default()):
        run = reuse.Watched(kit, clip, way)
        seen = [run.frame(one.movedim(0, -1)[None]) for one in pictures[:6]]
        assert run.stream.roads()["road"] == "direct" and len(run.ms) == 6 and min(run.ms) > 0
        plain = kit.run(clip, way, pictures[:6])
        assert torch.equal(torch.cat([s for s in seen if s is not None]).movedim(-1, 1), plain)


@pytest.mark.parametrize(("interval", "depth"), [(4, 0), (8, 1)])
def test_the_share_is_what_the_blocks_cost(kit, clip, pictures, interval, depth):
    """Of the embedded model at 64 x 64, counted block by block, of a steady stream's ticks."""
    import reuse
    from livediffusion.engine.blocks.schedule import DEPTHS
    from torch.utils.flop_counter import FlopCounterMode

    name = {0: DEPTHS[0], 1: DEPTHS[2]}[depth]
    share = reuse.film(kit, clip, reuse.reused(interval, name, 0.0), pictures[:16])[1]
    unet = kit.model.get_model_object("diffusion_model")
    counted = FlopCounterMode(display=False, depth=9)
    with torch.inference_mode(False), torch.no_grad(), counted:
        unet(torch.zeros(1, 48, 16, 16), torch.ones(1), torch.zeros(1, 77, 64),
             y=torch.zeros(1, 64))  # fmt: skip
    blocks = counted.get_flop_counts()
    outer = [f"Network.input_blocks.{i}.0" for i in range(depth + 1)]
    outer += [f"Network.output_blocks.{5 - i}.0" for i in range(depth + 1)]
    outer += ["Network.out", "Network.time_embed", "Network.label_emb"]
    spent = sum(sum(blocks[part].values()) for part in outer if part in blocks)
    every = spent / counted.get_total_flops()
    assert share == pytest.approx(every + (1 - every) / interval, abs=2e-4)
    assert reuse.film(kit, clip, reuse.OFF, pictures[:4])[1] == 1


def test_errors_of_a_clip_are_put_together_as_squares():
    """A mean of decibels would praise a clip whose every other frame is exact."""
    import reuse

    right = torch.full((2, 3, 8, 8), 0.5)
    out = right.clone()
    out[1] += 0.1
    each = reuse.errors(out, right)
    assert each.tolist() == pytest.approx([0, 0.01], abs=1e-7)
    assert reuse.decibels(float(each.mean())) == pytest.approx(23.01, abs=0.01)
    assert reuse.decibels(float(each[0])) == 100
    # beyond white and black nothing is seen
    assert float(reuse.errors(right + 9, right + 7).max()) == 0


def test_tables_compare_with_the_whole_network():
    import reuse

    both = {"sharpness": 1.0, "frame": 30.0}
    whole = [{"moves": True, "share": 1.0, "psnr": 100.0, "warp error": 4.0, **both},
             {"moves": False, "share": 1.0, "psnr": 100.0, "flicker": 2.0, **both}]  # fmt: skip
    some = [{"moves": True, "share": 0.6, "psnr": 40.0, "warp error": 5.0, **both},
            {"moves": False, "share": 0.1, "psnr": 10.0, "flicker": 1.0, **both}]  # fmt: skip
    rows = reuse.table({reuse.OFF.name: whole, "half": some})
    assert rows[1]["warp error / whole"] == 1.25 and rows[1]["flicker / whole"] == 0.5
    # still scenes are for their flicker alone
    assert (rows[1]["share of FLOPs"], rows[1]["PSNR"], rows[1]["worst clip"]) == (0.6, 40, 40)
    told = reuse.markdown(rows, reuse.COLUMNS).splitlines()
    assert len(told) == 4 and len({line.count("|") for line in told}) == 1
    assert "| same |" in told[2]


def test_the_page_can_be_written_again(pictures, tmp_path):
    import calm_sheets
    import reuse

    page = tmp_path / "reuse.md"
    page.write_text((reuse.ROOT / "docs" / page.name).read_text(encoding="utf-8"), encoding="utf-8")
    films = [{name: calm_sheets.kept(pictures[:3]) for name in ("camera", "whole")}]
    written = []
    for value in (1.0, 0.5, 0.5):
        row = {"way": "whole", "PSNR": value}
        reuse.write("Of one clip.", [row], [row], [row], films, [None], tmp_path)
        written.append(page.read_text(encoding="utf-8"))
    # what is told of another run goes with its tables
    parts = written[0].split(reuse.MARKS[0])[1].split(reuse.MARKS[1])
    assert parts[0].startswith("\n\nOf one clip.\n\n|") and "128 x 128" not in parts[0]
    assert "| whole | 1.00 |" in written[0] and "| whole | 1.00 |" not in written[1]
    assert written[1] == written[2] and "| whole | 0.50 |" in written[1]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"reuse.md", "reuse.webp", "reuse.jpg"}
    assert all(f"]({name})" in written[2] for name in names - {page.name})


def test_the_bars_are_those_of_live_reuse_as_it_is_put_in(tmp_path):
    import measure
    import reuse

    report = measure.Report(tmp_path / "b.json", {})
    good = {"way": reuse.default().name, "share of FLOPs": 0.6, "UNet / whole": 0.6, "PSNR": 35.0,
            "worst clip": 29.0}  # fmt: skip
    after = [{"way": good["way"], "frame after the cut": t, "look, dB more, the worst": -3 + t}
             for t in (1, 2, 3)]  # fmt: skip
    other = dict.fromkeys(good, 0.0) | {"way": "another"}
    reuse.bars(report, [other, good], after)
    assert len(report.bars) == 5 and all(bar.ok for bar in report.bars)
    reuse.bars(report, [good | {"PSNR": 33.9, "share of FLOPs": 0.66}], after)
    assert sum(not bar.ok for bar in report.bars) == 2


def test_streams_with_patchwork_are_timed_whole(kit, clip, pictures):
    """All calls of both, and no call that nobody timed."""
    import patchwork
    from livediffusion.host.models import patchwork as own

    tried, kind = own.tried, type(kit.model.get_model_object("diffusion_model"))
    moving = patchwork.streamed(kit, clip, pictures[:12])
    still = patchwork.streamed(kit, clip, pictures[:1].expand(12, -1, -1, -1))
    assert still["computed"] == 0 and 0 < moving["computed"] <= 1
    assert still["PSNR"] > 60
    assert 0 < still["UNet / whole"] < moving["UNet / whole"] and still["whole, ms"] > 0
    with pytest.raises(RuntimeError, match="no multiples of"):
        patchwork.streamed(kit, clip, pictures[:2, :, :40, :40])
    assert own.tried is tried and type(kit.model.get_model_object("diffusion_model")) is kind
