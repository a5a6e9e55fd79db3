"""The clients of run.py without a server: what they read, say, put together and leave behind."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction

import av
import filming
import numpy as np
import pytest
from films import write_gif
from serving import ROOT

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

UNEVEN = [0.0, 0.04, 0.3, 0.317, 1.0]


@pytest.fixture
def clip(comfyui):
    from livediffusion.demo import clip

    return clip


@pytest.fixture
def timed(comfyui):
    from livediffusion.demo import timed

    return timed


def said_by(module, tmp_path, monkeypatch, capsys, *arguments):
    """The one line that a client says before it ends with an error."""
    argv = ["x", "--server", "http://127.0.0.1:1", "--folder", str(tmp_path / "base")]
    monkeypatch.setattr("sys.argv", [*argv, *arguments])
    monkeypatch.chdir(tmp_path)
    try:
        code = module.main()
    except SystemExit as end:
        code = end.code
    assert code in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    return lines[0]


@pytest.mark.parametrize("client", ["clip", "live"])
@pytest.mark.parametrize(
    "option",
    [
        "--size=255", "--size=0", "--size=-8", "--size=66", "--size=999999", "--size=x",
        "--frames=0", "--frames=-1", "--frames=1.5", "--steps=0", "--steps=101", "--steps=two",
        "--strength=2", "--strength=-1", "--strength=nan", "--cfg=inf", "--cfg=x", "--delta=-1",
        "--delta=99", "--nonsense=1",
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_done_is_one_sentence(
    comfyui, client, option, tmp_path, monkeypatch, capsys
):
    from livediffusion.demo import clip, live

    module = {"clip": clip, "live": live}[client]
    said = said_by(module, tmp_path, monkeypatch, capsys, option)
    assert said.startswith(f"run.py {client}")
    assert option.split("=")[0] in said


@pytest.mark.parametrize(
    "option", ["--seed=-1", "--seed=x", "--frames-per-slot=0", "--mode=loud", "--engine=steam"]
)
def test_a_clips_own_arguments_too(clip, option, tmp_path, monkeypatch, capsys):
    assert option.split("=")[0] in said_by(clip, tmp_path, monkeypatch, capsys, option)


@pytest.mark.parametrize("client", ["clip", "live"])
@pytest.mark.parametrize("kind", ["none", "text", "folder", "empty", "gif", "locked", "sound"])
def test_a_file_that_cannot_be_shown_is_one_sentence(
    comfyui, client, kind, tmp_path, monkeypatch, capsys
):
    from livediffusion.demo import clip, live

    path = tmp_path / f"{kind}.mp4"
    if kind == "text":
        path.write_text("no video", encoding="utf-8")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "gif":
        path.write_bytes(write_gif(tmp_path / "whole.gif").read_bytes()[:30])
    elif kind == "locked":
        filming.film(path)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("whoever runs this may read everything")
    elif kind == "sound":
        with av.open(str(path), "w") as out:
            filming.beep(out, out.add_stream("aac", rate=44100), 0.1)
    module = {"clip": clip, "live": live}[client]
    said = said_by(module, tmp_path, monkeypatch, capsys, "--video", str(path))
    assert said.startswith(f"run.py {client}: --video: ") and path.name in said


@pytest.mark.parametrize("client", ["clip", "live"])
def test_no_server_and_no_place_for_the_results_are_said(
    comfyui, client, tmp_path, monkeypatch, capsys
):
    from livediffusion.demo import clip, live

    module = {"clip": clip, "live": live}[client]
    path = write_gif(tmp_path / "a.gif")
    said = said_by(module, tmp_path, monkeypatch, capsys, "--video", str(path), "--out", str(path))
    assert "--out" in said
    said = said_by(module, tmp_path, monkeypatch, capsys, "--video", str(path))
    assert "127.0.0.1" in said
    # nothing is left of the copy
    assert list((tmp_path / "base" / "input").iterdir()) == []


def test_times_are_the_files_own(clip, tmp_path):
    gif = filming.animation(tmp_path / "a.gif", [2000] * 4)
    assert clip.read(gif, 48, 32).times == pytest.approx([0, 2, 4, 6, 8])
    uneven = filming.film(tmp_path / "a.mp4", "libx264", times=UNEVEN, last=0.5)
    assert clip.read(uneven, 48, 32).times == pytest.approx([*UNEVEN, 1.5], abs=1e-3)
    # and of a part of it
    assert clip.read(uneven, 3, 32).times == pytest.approx(UNEVEN[:4], abs=1e-3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_phones_video_is_upright(clip, tmp_path, degrees):
    path = filming.phone(tmp_path / "phone.mp4", degrees)
    frames = clip.read(path, 3, 32).frames
    assert np.abs(filming.corners(np.asarray(frames[0])) - filming.CORNERS).max() < 14


def made(clip, path, count=5, rate=10):
    from PIL import Image

    pictures = [Image.fromarray(filming.scene(64, 64, 10 * i)) for i in range(count)]
    clip.write_video(pictures, rate, path)
    return pictures


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_a_result_gets_the_inputs_times_and_no_frame_is_lost(clip, timed, tmp_path, count):
    made(clip, tmp_path / "made.mp4", count)
    rng = np.random.default_rng(count)
    times = [0.0, *np.cumsum(rng.choice([0.01, 0.04, 0.5, 2.0], count)).tolist()]
    source = write_gif(tmp_path / "source.gif")
    timed.write(tmp_path / "made.mp4", source, times, tmp_path / "out.mp4")
    got = clip.read(tmp_path / "out.mp4", 100, 64)
    assert got.times == pytest.approx(times, abs=1e-3)
    reds = [np.asarray(f)[10, 10, 0] for f in got.frames]
    assert np.allclose(reds, [200 - min(10 * i, 56) for i in range(count)], atol=6)
    assert {p.name for p in tmp_path.iterdir()} == {"made.mp4", "source.gif", "out.mp4"}


def sound(path):
    """(seconds, loudness, rate) of the sound of a film, None for none."""
    with av.open(str(path)) as film:
        if not film.streams.audio:
            return None
        frames = list(film.decode(audio=0))
        to_float = av.AudioResampler("fltp", "mono")
        frames = [g for f in frames for g in to_float.resample(f)]
        wave = np.concatenate([f.to_ndarray()[0] for f in frames])
        return len(wave) / frames[0].sample_rate, wave, frames[0].sample_rate


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mp4", "aac"), ("mov", "pcm_s16le"), ("mkv", "ac3"), ("mkv", "flac"), ("webm", "libopus"),
     ("avi", "libmp3lame")],
)  # fmt: skip
def test_the_sound_comes_along_as_long_as_the_pictures(clip, timed, tmp_path, ending, codec):
    video = {"webm": "libvpx"}.get(ending, "mpeg4")
    source = filming.film(tmp_path / f"a.{ending}", video, frames=20, sound=codec)
    if source is None:
        pytest.skip(f"no encoder {video}")
    made(clip, tmp_path / "made.mp4", 10)
    # ten of twenty frames
    times = clip.read(source, 10, 64).times
    timed.write(tmp_path / "made.mp4", source, times, tmp_path / "out.mp4")
    seconds, wave, rate = sound(tmp_path / "out.mp4")
    assert seconds == pytest.approx(times[-1], abs=0.06)
    # the tone of 440 Hz, from the beginning
    middle = wave[rate // 20 : rate // 2]
    spectrum = np.abs(np.fft.rfft(middle))
    assert np.argmax(spectrum) * rate / len(middle) == pytest.approx(440, abs=5)
    _, original, its = sound(source)
    loud = [np.sqrt((w[r // 20 : r // 2] ** 2).mean()) for w, r in ((wave, rate), (original, its))]
    assert loud[0] == pytest.approx(loud[1], rel=0.1)


def test_sound_that_begins_late_stays_with_its_picture(clip, timed, tmp_path):
    source = tmp_path / "late.mkv"
    with av.open(str(source), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        tone = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        for _ in range(10):
            picture = av.VideoFrame.from_ndarray(filming.scene(), format="rgb24")
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
        frame = av.AudioFrame.from_ndarray(np.full((1, 4000), 9000, np.int16), "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 4000, Fraction(1, 8000)
        out.mux(tone.encode(frame))
        out.mux(tone.encode())
    made(clip, tmp_path / "made.mp4", 10)
    times = [i / 10 for i in range(11)]
    timed.write(tmp_path / "made.mp4", source, times, tmp_path / "out.mp4")
    _, wave, rate = sound(tmp_path / "out.mp4")
    assert np.abs(wave[: round(0.4 * rate)]).max() < 0.05
    assert np.abs(wave[round(0.55 * rate) : round(0.6 * rate)]).max() > 0.1


@pytest.mark.parametrize("later", [0.0, 60.0])
@pytest.mark.parametrize("ending", ["ts", "mpg"])
def test_sound_stays_with_its_pictures_when_the_clock_starts_again(
    clip, timed, tmp_path, ending, later
):
    """Put together from two films, of which the second begins again or much later."""
    codec, kind = {"ts": ("aac", "mpegts"), "mpg": ("mp2", "mpeg")}[ending]
    parts = [tmp_path / f"{i}.{ending}" for i in range(2)]
    for part, begins in zip(parts, (1.0, 1.0 + later), strict=True):
        with av.open(str(part), "w", format=kind) as out:
            stream = out.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            tone = out.add_stream(codec, rate=48000, layout="stereo")
            packets = []
            for i in range(50):
                # white while it is loud: in the second half of each second
                shade = 230 if i % 25 >= 12 else 20
                picture = np.full((32, 48, 3), shade, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i + round(25 * begins), Fraction(1, 25)
                packets += stream.encode(frame)
            packets += stream.encode()
            form = tone.codec_context.format.name
            to_form = av.AudioResampler(form, "stereo", 48000, 1024 if ending == "ts" else 1152)
            at = np.arange(96000) / 48000
            wave = 0.5 * np.sin(2 * np.pi * 440 * at) * (at % 1 >= 0.48)
            data = np.stack([wave, wave]).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(data, "fltp", "stereo")
            frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
            frame.pts = round(48000 * begins)
            for one in (*to_form.resample(frame), *to_form.resample(None)):
                packets += tone.encode(one)
            packets += tone.encode()
            packets.sort(key=lambda packet: packet.dts * packet.time_base)
            out.mux(packets)
    source = tmp_path / f"both.{ending}"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    read = clip.read(source, 200, 32)
    assert len(read.frames) >= 95 and read.times[-1] == pytest.approx(4, abs=0.2)
    made(clip, tmp_path / "made.mp4", len(read.frames))
    timed.write(tmp_path / "made.mp4", source, read.times, tmp_path / "out.mp4")
    seconds, wave, rate = sound(tmp_path / "out.mp4")
    assert seconds == pytest.approx(read.times[-1], abs=0.15)
    grid = np.arange(0.1, seconds - 0.1, 0.01)
    index = np.searchsorted(read.times, grid, "right") - 1
    white = np.array([np.asarray(f).mean() > 120 for f in read.frames])[index]
    loud = [np.abs(wave[round((t - 0.01) * rate) : round((t + 0.01) * rate)]).max() for t in grid]
    assert np.mean(white == (np.array(loud) > 0.2)) > 0.85


def test_a_picture_has_no_sound(clip, timed, tmp_path):
    made(clip, tmp_path / "made.mp4", 2)
    source = write_gif(tmp_path / "a.gif", 2, 100)
    timed.write(tmp_path / "made.mp4", source, [0, 0.1, 0.2], tmp_path / "out.mp4")
    assert sound(tmp_path / "out.mp4") is None


def test_the_workflow_stays_in_the_result(clip, timed, tmp_path):
    from PIL import Image

    tagged = {"movflags": "use_metadata_tags"}
    filming.film(tmp_path / "made.mp4", "libx264", frames=2, container=tagged,
             metadata={"prompt": '{"1": 2}'})  # fmt: skip
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    timed.write(tmp_path / "made.mp4", tmp_path / "a.png", [0, 1, 2], tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as film:
        assert film.metadata["prompt"] == '{"1": 2}'


def test_a_copy_is_gone_whatever_happens_and_so_are_forgotten_ones(comfyui, tmp_path):
    from livediffusion.demo.client import LEFT_BEHIND, lent

    inputs = tmp_path / "input"
    inputs.mkdir()
    for name, age in (("livediffusion-old.mp4", 2 * LEFT_BEHIND), ("livediffusion-new.mp4", 60),
                      ("holiday.mp4", 2 * LEFT_BEHIND)):  # fmt: skip
        (inputs / name).touch()
        os.utime(inputs / name, (time.time() - age,) * 2)
    source = write_gif(tmp_path / "a.gif")
    os.utime(source, (1, 1))
    for failure in (KeyboardInterrupt, ValueError, None):
        try:
            with lent(tmp_path, ".gif", source) as path:
                assert path.parent == inputs and path.read_bytes() == source.read_bytes()
                # a copy of an old file is a new one
                assert time.time() - path.stat().st_mtime < 60
                if failure:
                    raise failure
        except (KeyboardInterrupt, ValueError):
            pass
        left = {p.name for p in inputs.iterdir()}
        assert left == {"livediffusion-new.mp4", "holiday.mp4"}
    assert source.is_file()


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("client", ["clip", "live"])
def test_a_client_that_is_stopped_cleans_up(comfyui, tmp_path, client, number):
    """Twice, as when Ctrl+C reaches it and run.py ends it, too; against a server that is silent."""
    import socket

    source = write_gif(tmp_path / "a.gif")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "demo" / "packed.py"), client, "--server", url, "--folder",
             str(tmp_path / "base"), "--video", str(source), "--out", str(tmp_path / "out")],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                assert len(list((tmp_path / "base" / "input").iterdir())) == 1
                process.send_signal(number)
                process.send_signal(signal.SIGTERM)
                _, said = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 130 and said == ""
    assert list((tmp_path / "base" / "input").iterdir()) == []
