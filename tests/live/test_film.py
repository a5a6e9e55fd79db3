"""Files as sources: what is read, what is refused, at which pace it plays."""

import itertools
import os
import resource
import struct
import threading
import time
import tracemalloc

import av
import filming
import numpy as np
import pytest
from clock import crowded
from films import write_gif, write_video
from hypothesis import given
from hypothesis import strategies as st
from livediffusion.live.feeds import FilmFeed
from livediffusion.live.media.folder import inside, listed
from livediffusion.live.media.pace import BEHIND, Pace
from livediffusion.live.media.reader import Reader, look_at, stills
from livediffusion.live.media.still import MOST_PIXELS, Damage, Unreadable
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
    assert (round_.frame, once.frame) == (5, 3)


@pytest.mark.parametrize("loop", [True, False])
def test_a_reader_of_a_file_that_changes_is_told_or_begins_anew(tmp_path, loop):
    path = tmp_path / "a.png"
    path.write_bytes(b"no picture")
    reader = Reader(path, loop)
    for _ in range(2):
        with pytest.raises(Unreadable, match=r"file: a.png cannot be read"):
            reader.next()
    for red in (10, 90):
        Image.new("RGB", (9, 9 + red), (red, 2, 3)).save(path)
        assert [int(reader.next()[0, 0, 0]) for _ in range(2)] == [red, red]
        assert reader.frame == int(loop)
    path.unlink()
    with pytest.raises(Unreadable, match=r"file: a.png is not there"):
        reader.next()


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
        "out/secret.gif", "", ".", "nothing.gif", "sub", "a.gif\0.png", 5, None, ["a.gif"],
        "x" * 5000, "\ud800.gif",
    )  # fmt: skip
    for name in refused:
        with pytest.raises(ValueError, match=r"file: "):
            inside(name, str(folder))
    assert listed(str(folder)) == ["a.gif", "link.gif"]
    assert listed(str(tmp_path / "none")) == []


def test_every_kind_that_comes_from_a_phone_or_camera_is_listed(tmp_path):
    kinds = [
        *("mp4", "m4v", "mov", "qt", "3gp", "3g2", "webm", "mkv", "avi", "mpg", "mpeg", "m1v"),
        *("m2v", "ogv", "y4m", "ts", "mts", "m2ts", "wmv", "asf", "flv", "gif", "webp", "png"),
        *("apng", "jpg", "jpeg", "jfif", "bmp", "tif", "tiff", "avif"),
    ]
    for kind in (*kinds, *(kind.upper() for kind in kinds)):
        (tmp_path / f"{kind}.{kind}").touch()
    for kind in ("m3u8", "mpd", "sdp", "txt", "svg", "mp3", "safetensors", "ffconcat"):
        (tmp_path / f"other.{kind}").touch()
    assert listed(str(tmp_path)) == sorted(f"{k}.{k}" for k in (*kinds, *map(str.upper, kinds)))


def test_a_new_file_is_listed(tmp_path):
    write_gif(tmp_path / "a.gif")
    assert listed(str(tmp_path)) == ["a.gif"]
    os.utime(tmp_path, ns=(0, 0))  # whatever the clock's grain, the next change is seen
    assert listed(str(tmp_path)) == ["a.gif"]
    write_gif(tmp_path / "b.gif")
    assert listed(str(tmp_path)) == ["a.gif", "b.gif"]


@pytest.mark.parametrize("kind", ["folder", "none", "locked"])
def test_what_cannot_be_opened_is_one_sentence(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.mp4"
    if kind == "folder":
        path.mkdir()
    if kind == "locked":
        write_video(path)
        # a test may be run by one who may read everything
        real = type(path).open
        monkeypatch.setattr(
            type(path), "open",
            lambda self, *a, **k: real(self.parent / "\0" if self != path else self, *a, **k)
            if self != path else (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
        )  # fmt: skip
    said = {"folder": "is a folder", "none": "not there", "locked": "Permission denied"}[kind]
    with pytest.raises(Unreadable, match=rf"^file: a.mp4 .*{said}[^\n]*$"):
        look_at(path)


def test_a_film_reads_no_other_file(tmp_path):
    """A mov whose pictures lie in another file: FFmpeg would read it if it were told to."""
    other = write_video(tmp_path / "other.mov")
    path = filming.refers(tmp_path / "refers.mov", other)
    told = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(path), container_options=told) as film:
        assert len(list(film.decode(video=0))) == 12
    with pytest.raises(Unreadable, match=r"^file: refers.mov cannot be read"):
        look_at(path)


@pytest.mark.parametrize("ending", ["png", "gif", "jpg", "y4m"])
def test_a_huge_picture_is_refused_before_anything_is_decoded(tmp_path, ending):
    path = tmp_path / f"bomb.{ending}"
    if ending == "png":
        filming.bomb(path)
    elif ending == "gif":
        Image.new("P", (9000, 9000)).save(path)
    elif ending == "jpg":
        Image.new("L", (8, 8)).save(path)
        data = path.read_bytes()
        at = data.index(b"\xff\xc0") + 5
        path.write_bytes(data[:at] + struct.pack(">HH", 60_000, 60_000) + data[at + 4 :])
    else:
        path.write_bytes(b"YUV4MPEG2 W9000 H9000 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(1000))
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(Unreadable, match=rf"bomb.{ending} .*million pixels"):
            look_at(path)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()
    # in kilobytes; writing the file may have taken more
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_photo_of_fifty_million_pixels_is_taken():
    assert 8160 * 6120 < MOST_PIXELS < 13_000 * 13_000 / 2


def test_a_film_whose_size_grows_is_played_as_far_as_it_may(tmp_path):
    """MPEG-TS, where a later part says another size than the first."""
    small = filming.film(tmp_path / "small.ts", "mpeg2video", size=(64, 48), rate=25)
    large = filming.film(tmp_path / "large.ts", "mpeg2video", size=(96, 64), rate=25)
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    got = list(stills(both))
    assert {s.picture().shape for s in got} == {(48, 64, 3), (64, 96, 3)}
    # its clock begins again in the middle, and the film goes on
    times = [s.time for s in got]
    assert times == sorted(set(times)) and times[-1] < 1


@pytest.mark.parametrize("times", [[5.0, 5.1, 1.0, 1.1], [0.0, 0.1, 9000.0, 9000.1]])
def test_a_clock_that_jumps_does_not_stop_a_film(tmp_path, times):
    parts = []
    for i in (0, 2):
        path = tmp_path / f"{i}.ts"
        filming.film(path, "mpeg2video", rate=25, frames=4, offset=times[i])
        parts.append(path.read_bytes())
    whole = tmp_path / "jumps.ts"
    whole.write_bytes(b"".join(parts))
    places = [s.time for s in stills(whole)]
    assert len(places) >= 7
    assert places == pytest.approx([i / 25 for i in range(len(places))], abs=0.1)


def test_many_frames_are_not_kept(tmp_path):
    path = tmp_path / "long.mkv"
    filming.film(path, "mpeg4", size=(640, 480), frames=90, rate=30)
    tracemalloc.start()
    try:
        count = sum(s.picture().shape == (480, 640, 3) for s in stills(path))
        assert count == 90
        # numpy's arrays are counted
        assert tracemalloc.get_traced_memory()[1] < 8 * 640 * 480 * 3
    finally:
        tracemalloc.stop()


def test_what_is_damaged_is_left_out_and_counted(tmp_path):
    path = filming.film(tmp_path / "a.mov", "png", "rgb24", frames=10)
    with av.open(str(path)) as film:
        packets = [p for p in film.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for i in (0, 4, 7):
        data[packets[i].pos : packets[i].pos + 40] = bytes(40)
    path.write_bytes(data)
    damage = Damage()
    shown = [s.time for s in stills(path, damage)]
    assert damage.parts == 3
    # the others in their own time, from the first that can be shown
    assert shown == pytest.approx([i / 10 for i in (0, 1, 2, 4, 5, 7, 8)], abs=1e-3)
    feed, got = play(path, 1.3)
    assert feed.error is None and feed.damaged >= 3 and len(got) > len(shown)


def test_a_film_that_is_cut_off_plays_what_it_has_and_goes_round(tmp_path):
    path = tmp_path / "a.mp4"
    fast = {"g": "4", "tune": "zerolatency"}
    first = {"movflags": "faststart"}
    filming.film(path, "libx264", frames=40, size=(160, 96), options=fast, container=first)
    with av.open(str(path)) as film:
        cut = [p for p in film.demux(video=0) if p.size][20]
    path.write_bytes(path.read_bytes()[: cut.pos + cut.size // 2])
    shown = list(stills(path))
    assert len(shown) in (20, 21)
    assert [s.time for s in shown] == pytest.approx([i / 10 for i in range(len(shown))], abs=1e-3)
    reader = Reader(path, True)
    first = reader.next()
    for _ in range(len(shown) - 1):
        reader.next()
    assert np.array_equal(reader.next(), first)


@given(
    lasts=st.lists(st.sampled_from([0.001, 0.01, 0.02, 1 / 60, 1 / 30, 0.1, 0.5, 2.0]), min_size=1,
                   max_size=30),
    fps=st.sampled_from([1, 5, 10, 24, 30, 60, 120]),
    slow=st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.004, 0.03, 0.2, 0.6]), min_size=1, max_size=9),
    passes=st.integers(1, 4),
    later=st.sampled_from([1, 12, 60]),
)  # fmt: skip
def test_a_film_keeps_its_pace_and_its_limit_whatever_happens(lasts, fps, slow, passes, later):
    """Virtual clock: uneven frames, slow readers, loops, and a limit that is edited on the way.

    Never early, never faster than asked, never out of order; all frames if there is time.
    """
    pace, now, shown, work = Pace(), 0.0, [], itertools.cycle(slow)
    times = [sum(lasts[:i]) for i in range(len(lasts))]
    span = sum(lasts)
    for k in range(passes):
        limit = fps if k < 2 else later
        pace.again(now)
        for time_, last in zip(times, lasts, strict=True):
            wait = pace.wait(time_, last, now, limit)
            if wait is not None:
                assert wait >= 0
                now += wait
                shown.append((now, k * span + time_, limit))
                now += next(work)
        now += pace.left(now)
    assert shown
    for (a, _, _), (b, _, limit) in itertools.pairwise(shown):
        assert b - a >= 1 / limit - 1e-6
    for at, place, _ in shown:
        # not before its own time, counted from the beginning
        assert at >= place - 1e-6
    places = [place for _, place, _ in shown]
    assert places == sorted(set(places))
    if max(slow) == 0 and all(last >= 1 / min(fps, later) for last in lasts):
        assert len(shown) == passes * len(lasts) and pace.dropped == 0
        # and it takes as long as it says
        assert now == pytest.approx(passes * span, abs=1e-3)


def test_a_film_that_falls_back_goes_on_from_there_and_one_a_little_late_catches_up():
    pace = Pace()
    pace.again(0.0)
    assert pace.wait(0.0, 0.1, 0.0, 60) == 0
    # a little late: shown at once, the next in its own time
    assert pace.wait(0.1, 0.1, 0.15, 60) == 0
    assert pace.wait(0.2, 0.1, 0.15, 60) == pytest.approx(0.05)
    # its time is over: left out
    assert pace.wait(0.3, 0.1, 0.45, 60) is None and pace.dropped == 1
    # far behind: shown, and all that follows is later by that
    late = 0.4 + BEHIND + 0.5
    assert pace.wait(0.4, 0.1, late, 60) == 0
    assert pace.wait(0.5, 0.1, late, 60) == pytest.approx(0.1)


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
    assert 9 / (2 * crowded() - 1) <= len(got) <= 14  # 20 per second
    assert [f.sequence for f, _ in got] == list(range(len(got)))
    assert got[0][0].image(Shape(16, 16)).shape == (1, 16, 16, 3)
    assert feed.error is None


def test_fps_is_the_most_a_film_gives(tmp_path):
    _, got = play(write_gif(tmp_path / "a.gif", 8, 20), 0.6, fps=10)
    assert 3 / (2 * crowded() - 1) <= len(got) <= 8


def test_a_film_that_does_not_go_round_ends(tmp_path):
    feed, got = play(write_gif(tmp_path / "a.gif", 3, 20), 0.4, loop=False)
    assert got and len(got) + feed.dropped + feed.slot.replaced == 3
    assert feed.slot.put(got[0][0]) is False


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    said = []

    def work():
        with pytest.raises(Unreadable, match=r"^file: a.mp4 is no file") as reason:
            look_at(tmp_path / "a.mp4")
        said.append(reason)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert said, "it waits"


def test_a_broken_film_says_why(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x" * 100)
    feed, got = play(tmp_path / "a.mp4", 0.2)
    assert not got and "a.mp4 cannot be read" in str(feed.error)


def test_the_limit_holds_where_a_film_begins_again(tmp_path):
    """One frame of 20 ms is a film, too."""
    _, got = play(write_gif(tmp_path / "a.gif", 1, 20), 0.6, fps=10)
    assert 3 / (2 * crowded() - 1) <= len(got) <= 7
    gaps = [b.arrived - a.arrived for (a, _), (b, _) in itertools.pairwise(got)]
    assert min(gaps) > 0.07, gaps


def test_a_still_is_decoded_once(tmp_path, monkeypatch):
    from livediffusion.live.media import pictures

    calls, real = [], pictures.stills
    monkeypatch.setattr(pictures, "stills", lambda *a: calls.append(a) or real(*a))
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(path)
    _, got = play(path, 0.5)
    assert len(got) >= 3 and len(calls) == 1


def test_a_file_that_is_replaced_or_gone_is_seen_at_the_next_round(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(path)
    feed = FilmFeed(path, 30, True)
    feed.shapes["1"] = Shape(16, 16)
    feed.begin()

    def latest(condition, seconds=5):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            frame = feed.slot.take()
            if frame is not None and condition(frame):
                return True
            time.sleep(0.005)
        return False

    assert latest(lambda frame: frame.picture[0, 0, 0] == 1)
    Image.new("RGB", (9, 12), (77, 2, 3)).save(path)
    assert latest(lambda frame: frame.picture[0, 0, 0] == 77)
    path.unlink()
    feed._thread.join(5)
    assert str(feed.error) == "file: a.png is not there, or not any more."
