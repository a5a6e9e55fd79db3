"""The clip workflow end to end: the client of `run.py clip` against a running ComfyUI."""

import re

import av
import filming
import numpy as np
import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.server]

FRAMES, SIZE, SLOTS = 8, 256, 2


@pytest.fixture(scope="module")
def clip(comfyui):
    from livediffusion.demo import clip

    return clip


@pytest.fixture(scope="module")
def source(clip, tmp_path_factory):
    """A clip of 8 frames, each a scene of its own so that a mix-up of frames shows."""
    from pictures import picture
    from PIL import Image

    path = tmp_path_factory.mktemp("source") / "source.mp4"
    frames = [Image.fromarray(picture(i, SIZE, SIZE)) for i in range(FRAMES)]
    clip.write_video(frames, 12.0, path)
    return path


def stylise(clip, server, monkeypatch, source, out, *options):
    """Run the client as run.py does; returns the output frames."""
    argv = ["clip", "--server", server.url, "--folder", str(server.base), "--video", str(source)]
    argv += ["--out", str(out), *options]
    monkeypatch.setattr("sys.argv", argv)
    code = clip.main()
    if code:
        return code
    made = clip.read(out / "clip.mp4", 100, SIZE)
    assert abs(made.rate - 12.0) < 0.1
    return [np.asarray(f, dtype=float) for f in made.frames]


def test_a_clip_goes_through(clip, server, source, tmp_path, monkeypatch, capsys):
    # an empty prompt leaves the look as it is, so that frames are told apart by what they show
    options = ["--prompt", "", "--mode", "off", "--strength", "0.4"]
    after = stylise(clip, server, monkeypatch, source, tmp_path, *options)
    said = capsys.readouterr().out
    assert len(after) == FRAMES
    assert re.search(rf"UNet calls +{FRAMES + SLOTS - 1}  \({FRAMES * SLOTS} rows\)", said), said
    # the bundled model's VAE takes no time that two digits show
    for stage, least in (("encode", 0), ("denoise", 0.01), ("decode", 0)):
        assert float(re.search(rf"{stage} +([\d.]+) s", said).group(1)) >= least, said
    assert float(re.search(r"fps +([\d.]+)", said).group(1)) > 0
    before = [np.asarray(f, dtype=float) for f in clip.read(source, 100, SIZE).frames]
    alike = np.array([[layout(a, b) for b in before] for a in after])
    # every output frame shows the layout of its own input frame, and is another picture
    assert (alike.argmax(axis=1) == np.arange(FRAMES)).all(), alike.round(2)
    for a, b in zip(after, before, strict=True):
        assert a.std() > 10
        assert np.abs(a - b).mean() > 2
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000


def layout(a, b) -> float:
    """Correlation of the brightness of two pictures, 16 x 16."""
    small = [p.mean(axis=2).reshape(16, 16, 16, 16).mean(axis=(1, 3)).ravel() for p in (a, b)]
    return float(np.corrcoef(*small)[0, 1])


@pytest.mark.parametrize(
    ("mode", "rows"), [("full", 2 * 4 * 2), ("onetime-negative", 4 * 2 + 4), ("off", 4 * 2)]
)
def test_options_reach_the_nodes(clip, server, source, tmp_path, monkeypatch, capsys, mode, rows):
    if not server.primary and mode != "off":
        pytest.skip("one mode is enough on the other versions")
    options = ["--mode", mode, "--steps", "2", "--prompt", "neon night", "--frames", "4"]
    options += ["--engine", "onnxruntime"] if mode == "off" else []
    after = stylise(clip, server, monkeypatch, source, tmp_path, *options)
    assert len(after) == 4
    assert f"UNet calls  5  ({rows} rows)" in capsys.readouterr().out


def test_bad_input_is_said_with_the_nodes_words(
    clip, server, source, tmp_path, monkeypatch, capsys
):
    assert stylise(clip, server, monkeypatch, source, tmp_path, "--strength", "0") == 1
    said = capsys.readouterr().err
    assert "LiveStrength" in said or "LiveStreamSampler" in said
    assert "Traceback" not in said
    assert "strength" in said
    assert [p for p in (server.base / "input").iterdir() if p.name.startswith("live")] == []
    # the server goes on
    after = stylise(clip, server, monkeypatch, source, tmp_path, "--steps", "1", "--frames", "2")
    assert len(after) == 2


def test_a_phones_video_comes_out_upright_with_its_times_and_its_sound(
    clip, server, tmp_path, monkeypatch
):
    """Stored turned, at a variable rate, with a tone; and nothing is left in ComfyUI's folders."""
    if not server.primary:
        pytest.skip("once is enough")
    times = [0.0, 0.1, 0.15, 0.6, 1.1]
    source = filming.film(tmp_path / "phone.mp4", "libx264", size=(96, 64), times=times, last=0.4,
                      sound="aac", turn=90)  # fmt: skip
    before = clip.read(source, 100, 64)
    assert np.abs(filming.corners(np.asarray(before.frames[0])) - filming.CORNERS).max() < 20
    kept = {p for name in ("input", "output") for p in (server.base / name).rglob("*")}
    argv = ["clip", "--server", server.url, "--folder", str(server.base), "--video", str(source)]
    argv += ["--out", str(tmp_path), "--size", "64", "--strength", "0.1", "--prompt", ""]
    monkeypatch.setattr("sys.argv", [*argv, "--mode", "off"])
    assert clip.main() == 0
    after = clip.read(tmp_path / "clip.mp4", 100, 64)
    assert after.times[:-1] == pytest.approx(times, abs=1e-3)
    colours = [filming.corners(np.asarray(f)) for f in (after.frames[0], before.frames[0])]
    # red, green, blue, yellow stay where they are
    assert np.abs(colours[0] - colours[1]).mean() < 40
    with av.open(str(tmp_path / "clip.mp4")) as film:
        # the last frame's own length is not what its place in the file's order of coding says
        assert film.duration / av.time_base == pytest.approx(1.5, abs=1e-3)
        samples = sum(frame.samples for frame in film.decode(audio=0))
        assert samples / film.streams.audio[0].rate == pytest.approx(1.5, abs=0.06)
        assert "prompt" in film.metadata
    left = {p for name in ("input", "output") for p in (server.base / name).rglob("*")}
    assert {p for p in left - kept if p.is_file()} == set()


@pytest.mark.parametrize("size", [64, 68, 132])
def test_every_size_that_is_taken_can_be_done(clip, server, source, tmp_path, monkeypatch, size):
    if not server.primary:
        pytest.skip("once is enough")
    options = ["--size", str(size), "--frames", "3", "--frames-per-slot", "2"]
    argv = ["clip", "--server", server.url, "--folder", str(server.base), "--video", str(source)]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(tmp_path), *options])
    assert clip.main() == 0
    with av.open(str(tmp_path / "clip.mp4")) as film:
        assert (film.streams.video[0].width, film.streams.video[0].height) == (size, size)
