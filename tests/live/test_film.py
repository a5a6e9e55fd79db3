"""Files as sources: what is read, what is refused, at which pace it plays."""

import os
import time

import numpy as np
import pytest
from films import write_gif, write_video
from livediffusion.live.feeds import FilmFeed
from livediffusion.live.film import Reader, inside, listed, stills
from livediffusion.live.pictures import Shape
from PIL import Image


def test_a_video_gives_its_frames_in_order(tmp_path):
    film = list(stills(write_video(tmp_path / "a.mp4")))
    assert [round(s.time * 30) for s in film] == list(range(12))
    greys = [s.picture().mean() for s in film]
    assert np.allclose(greys, [10 + 15 * i for i in range(12)], atol=4)


def test_an_animated_picture_gives_its_frames_and_durations(tmp_path):
    film = list(stills(write_gif(tmp_path / "a.gif")))
    assert [s.time for s in film] == pytest.approx([0, 0.05, 0.1, 0.15])
    assert [s.picture()[0, 0, 0] for s in film] == pytest.approx([0, 60, 120, 180], abs=3)


def test_a_still_picture_is_a_film_of_one_frame(tmp_path):
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "a.png")
    assert len(list(stills(tmp_path / "a.png"))) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_a_broken_file_is_said_to_be_one(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind" * 20)
    with pytest.raises(ValueError, match=rf"file: {name} cannot be read"):
        list(stills(tmp_path / name))


def test_a_reader_goes_round_or_stays_at_the_end(tmp_path):
    path = write_gif(tmp_path / "a.gif")
    round_, once = Reader(path, True), Reader(path, False)
    reds = [[int(r.next()[0, 0, 0]) for _ in range(6)] for r in (round_, once)]
    assert reds[0][:4] == reds[1][:4]
    assert reds[0][4:] == reds[0][:2]
    assert reds[1][4:] == [reds[1][3]] * 2


def test_files_stay_inside_the_folder(tmp_path):
    folder = tmp_path / "input"
    (folder / "sub").mkdir(parents=True)
    outside = write_gif(tmp_path / "secret.gif")
    write_gif(folder / "a.gif")
    write_gif(folder / "sub" / "b.gif")
    os.symlink(outside, folder / "link.gif")
    os.symlink(tmp_path, folder / "out")
    assert inside("a.gif", str(folder)) == folder / "a.gif"
    assert inside("sub/b.gif", str(folder)).name == "b.gif"
    refused = (
        "../secret.gif", "sub/../../secret.gif", str(outside), str(folder / "a.gif"), "link.gif",
        "out/secret.gif", "", ".", "nothing.gif", "sub", "a.gif\0.png",
    )  # fmt: skip
    for name in refused:
        with pytest.raises(ValueError, match=r"file: |null"):
            inside(name, str(folder))
    assert listed(str(folder)) == ["a.gif", "link.gif"]
    assert listed(str(tmp_path / "none")) == []


def test_a_new_file_is_listed(tmp_path):
    write_gif(tmp_path / "a.gif")
    assert listed(str(tmp_path)) == ["a.gif"]
    os.utime(tmp_path, ns=(0, 0))  # whatever the clock's grain, the next change is seen
    assert listed(str(tmp_path)) == ["a.gif"]
    write_gif(tmp_path / "b.gif")
    assert listed(str(tmp_path)) == ["a.gif", "b.gif"]


def play(path, seconds, fps=120, loop=True):
    """(frame, seconds since the beginning) of all that a feed puts, read by a busy reader."""
    feed = FilmFeed(path, fps, loop)
    feed.shapes["1"] = Shape(16, 16)
    got, began = [], time.monotonic()
    feed.begin()
    while time.monotonic() - began < seconds:
        if (frame := feed.slot.take()) is not None:
            got.append((frame, frame.arrived - began))
        time.sleep(0.001)
    feed.end()
    feed._thread.join(2)
    assert not feed._thread.is_alive()
    return feed, got


def test_a_film_plays_in_its_own_time_and_goes_round(tmp_path):
    feed, got = play(write_gif(tmp_path / "a.gif", 4, 50), 0.65)
    assert 9 <= len(got) <= 14  # 20 per second
    assert [f.sequence for f, _ in got] == list(range(len(got)))
    assert got[0][0].image(Shape(16, 16)).shape == (1, 16, 16, 3)
    assert feed.error is None


def test_fps_is_the_most_a_film_gives(tmp_path):
    _, got = play(write_gif(tmp_path / "a.gif", 8, 20), 0.6, fps=10)
    assert 3 <= len(got) <= 8


def test_a_film_that_does_not_go_round_ends(tmp_path):
    feed, got = play(write_gif(tmp_path / "a.gif", 3, 20), 0.4, loop=False)
    assert len(got) == 3
    assert feed.slot.put(got[0][0]) is False


def test_a_broken_film_says_why(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x" * 100)
    feed, got = play(tmp_path / "a.mp4", 0.2)
    assert not got and "a.mp4 cannot be read" in str(feed.error)
