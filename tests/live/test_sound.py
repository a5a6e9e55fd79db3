"""The sound of a film in the recording of a run on it."""

import asyncio

import av
import inprocess
import numpy as np
import pytest
from films import BEEPS_LAST as LENGTH
from films import write_beeps as write_film
from inprocess import Client, graph
from livediffusion.live.feeds import Place
from livediffusion.live.sinks.names import Wish
from livediffusion.live.sinks.record import Recorder
from livediffusion.live.sinks.sound import RATE, Sound, Track

pytestmark = [pytest.mark.comfy, pytest.mark.slow]


def heard(path):
    """Times of white pictures and of loud sound, on one grid of 200 Hz, and the samples."""
    with av.open(str(path)) as film:
        pictures, samples, began = [], [], None
        for frame in film.decode():
            if isinstance(frame, av.VideoFrame):
                pictures.append((frame.time, frame.to_ndarray(format="gray").mean() > 120))
            else:
                began = frame.time if began is None else began
                samples.append(frame.to_ndarray())
        seconds = film.duration / av.time_base
    samples = np.concatenate(samples, 1)
    grid = np.arange(0, seconds, 0.005)
    index = np.searchsorted([t for t, _ in pictures], grid, "right") - 1
    white = np.array([w for _, w in pictures])[np.maximum(index, 0)] & (index >= 0)
    places = ((grid[:, None] - began + np.linspace(0, 0.005, 60)) * RATE).astype(int)
    inside = (places >= 0) & (places < samples.shape[1])
    power = np.abs(np.where(inside, samples[0][np.clip(places, 0, samples.shape[1] - 1)], 0))
    return white, power.max(1) > 0.4, seconds, samples.shape[1] / RATE


def late(white, loud):
    """By how many seconds the sound comes after its pictures."""
    shifts = range(-100, 101)
    agree = [np.mean(white[100:-100] == np.roll(loud, -s)[100:-100]) for s in shifts]
    best = max(agree)
    assert best > 0.85
    return 0.005 * np.mean([s for s, a in zip(shifts, agree, strict=True) if a == best])


@pytest.mark.timeless
@pytest.mark.parametrize("begins", [0.0, 1.0])
def test_any_part_of_a_films_sound(tmp_path, begins):
    path = tmp_path / "film.mov"  # whose times are exact
    whole = write_film(path, begins=begins)
    track, chance = Track(path), np.random.default_rng(4)
    for position in [0.0, -0.1, *chance.uniform(-0.3, LENGTH + 0.5, 30), LENGTH - 0.05, LENGTH + 9]:
        # several in a row, as a recording asks for them
        for _ in range(3):
            count = int(chance.integers(1, 9000))
            got = track.read(position, count)
            places = np.arange(count) + round(position * RATE)
            inside = (places >= 0) & (places < whole.shape[1])
            wanted = np.where(inside, whole[:, np.clip(places, 0, whole.shape[1] - 1)], 0)
            # a sample more or less, where a position is between two
            away = [np.abs(got[:, 1 + s : count - 1 + s] - wanted[:, 1 : count - 1]).mean()
                    for s in (-1, 0, 1)] if count > 50 else [0]  # fmt: skip
            assert got.shape == (2, count) and min(away) < 0.01, (position, count, away)
            position += count / RATE
    track.close()


@pytest.mark.timeless
def test_the_sound_follows_what_the_pictures_say(tmp_path):
    """Late, again from the beginning, another film, no film: each asked of the right place."""
    path, other, silent = (tmp_path / name for name in ("a.mkv", "b.mkv", "c.mkv"))
    whole = write_film(path)
    write_film(other)
    write_film(silent, sound=False)
    sound = Sound(100.0)
    sound.shown(100.0, Place(path, 0.5))
    assert sound.there

    def place(got):
        """Where in the film these samples are from."""
        tries = range(0, whole.shape[1] - got.shape[1], 240)
        errors = [np.abs(whole[:, t : t + got.shape[1]] - got).mean() for t in tries]
        return tries[int(np.argmin(errors))] / RATE

    assert place(sound.until(100.1)) == pytest.approx(0.5, abs=0.006)
    for i in range(1, 5):  # jitter of the run is no reason to jump
        sound.shown(100.1 + i / 25, Place(path, 0.6 + i / 25 + (-1) ** i * 0.06))
    assert place(sound.until(100.3)) == pytest.approx(0.6, abs=0.006)
    for i in range(30):  # all are later by a little
        sound.shown(100.3 + i / 25, Place(path, 0.8 + i / 25 + 0.15))
    sound.until(100.5)
    assert place(sound.until(100.6)) == pytest.approx(1.0 + 0.15, abs=0.05)
    sound.shown(100.6, Place(path, 0.0))  # the film begins again
    assert place(sound.until(100.7)) == pytest.approx(0.0, abs=0.006)
    sound.shown(100.7, None)
    assert not sound.there and not sound.until(100.8).any()
    sound.shown(100.8, Place(silent, 0.3))
    assert not sound.there and not sound.until(100.9).any()
    sound.shown(100.9, Place(other, 0.3))
    assert place(sound.until(101.0)) == pytest.approx(0.3, abs=0.006)
    assert sound.until(101.0).shape == (2, 0)
    sound.end()


def test_a_run_on_a_film_is_recorded_with_its_sound(tmp_path, monkeypatch):
    """Over the end and from the beginning again, and in time with the pictures."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    write_film(tmp_path / "film.mp4", "aac")
    made = graph(source="file", file="film.mp4", fps=60)
    made["5"]["inputs"].update(record=True, filename_prefix="live/r")

    async def work(http):
        client = await Client.start(http, comfy.url, made)
        await client.wait(lambda: client.views)
        await asyncio.sleep(2.3 * LENGTH)
        await client.stop()
        return client

    with inprocess.comfy() as (comfy, _):
        client = inprocess.live(work)
    assert not client.problems
    white, loud, seconds, long = heard(tmp_path / "live" / "r_00001_.mp4")
    assert seconds == pytest.approx(client.recorded[0]["seconds"], abs=0.1)
    assert long == pytest.approx(seconds, abs=0.15)
    assert white.mean() > 0.15 and abs(late(white, loud)) < 0.1


def test_what_has_no_sound_gets_none(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    write_film(tmp_path / "silent.mp4", sound=False)
    (tmp_path / "gone.mp4").write_bytes(b"no film")
    for name in ("silent.mp4", "gone.mp4", None):
        told = []
        one = Recorder(Wish(True, "r", None, None), told.append)
        one.put(np.zeros((32, 32, 3), np.uint8), name and Place(tmp_path / name, 0.0))
        one.end()
        assert one.over.wait(10) and told[0]["type"] == "recorded"
        with av.open(str(tmp_path / told[0]["file"])) as film:
            assert not film.streams.audio and film.streams.video


def test_a_recording_that_is_switched_on_while_it_plays_has_its_sound(tmp_path, monkeypatch):
    """One file, in time from its first picture on, which was there before."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    write_film(tmp_path / "film.mp4", "aac")

    def made(record):
        graph_ = graph(source="file", file="film.mp4", fps=60)
        graph_["5"]["inputs"].update(record=record, filename_prefix="live/r")
        return graph_

    async def work(http):
        client = await Client.start(http, comfy.url, made(False))
        await client.wait(lambda: len(client.views) > 5)
        status, _ = await client.post("update", prompt=made(True), workflow={"id": "w"})
        assert status == 200
        await client.wait(lambda: list(tmp_path.glob("live/*")))
        await asyncio.sleep(1.3 * LENGTH)
        await client.stop()
        return client

    with inprocess.comfy() as (comfy, _):
        client = inprocess.live(work)
    assert not client.problems and len(client.recorded) == 1
    white, loud, seconds, long = heard(tmp_path / "live" / "r_00001_.mp4")
    assert long == pytest.approx(seconds, abs=0.15)
    assert white.mean() > 0.15 and abs(late(white, loud)) < 0.1
