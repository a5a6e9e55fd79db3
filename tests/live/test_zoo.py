"""A zoo of files: each is shown as ComfyUI's own loaders show it, or refused in one sentence."""

import os

import numpy as np
import pytest
import zoo
from livediffusion.live.feeds import FilmFeed
from livediffusion.live.media.reader import stills
from livediffusion.live.media.still import Damage, Unreadable
from livediffusion.live.pictures import Shape

SEED = int(os.environ.get("LIVEDIFFUSION_ZOO", "0"))  # where files are cut off and made wrong
# what stock does not know: mirrored films, the EXIF numbers that mirror
MIRRORED = ("phone_", "exif2", "exif4", "exif5", "exif7")


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    found = list(zoo.everything(tmp_path_factory.mktemp("zoo"), SEED))
    assert len(found) >= 200
    return found


def frames(path):
    """(time, lasts, picture) of each frame; the sentence that refuses the file; the damage."""
    damage = Damage()
    try:
        return [(s.time, s.lasts, s.picture()) for s in stills(path, damage)], None, damage
    except Unreadable as reason:
        return [], str(reason), damage


@pytest.fixture(scope="module")
def read(animals):
    return {animal.path: frames(animal.path) for animal in animals}


def one_sentence(said, path):
    # the name, and no more of where it lies
    assert said.startswith("file: ") and path.name in said and str(path.parent) not in said, said
    assert "\n" not in said and "Errno" not in said and "avcodec" not in said, said


@pytest.mark.timeless
def test_what_is_whole_is_shown_and_nothing_else(animals, read):
    """By size, times, and which way up; what may not be shown is refused in one sentence."""
    for animal in animals:
        got, said, damage = read[animal.path]
        assert animal.shown in (None, said is None), (animal, said)
        if said is not None:
            one_sentence(said, animal.path)
            continue
        times = [time for time, _, _ in got]
        assert times[0] == 0 and times == sorted(set(times)), animal
        assert all(lasts > 0 for _, lasts, _ in got), animal
        assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for _, _, p in got)
        if animal.shown:
            assert damage.parts == 0, animal
        if animal.size is not None:
            assert {p.shape[1::-1] for _, _, p in got} == {animal.size}, animal
        if animal.times is not None:
            assert times == pytest.approx(animal.times, abs=1e-3), animal
        if animal.ends is not None:
            assert got[-1][0] + got[-1][1] == pytest.approx(animal.ends, abs=1e-3), animal
        if animal.upright:
            assert np.abs(zoo.corners(got[0][2]) - zoo.CORNERS).max() < 14, animal


@pytest.mark.timeless
@pytest.mark.comfy
@pytest.mark.slow
def test_it_is_what_comfyui_shows(animals, read, monkeypatch):
    import folder_paths

    import nodes

    monkeypatch.setattr(folder_paths, "input_directory", str(animals[0].path.parent))
    compared = 0
    for animal in animals:
        got, said, _ = read[animal.path]
        if said is not None:
            continue
        try:
            stock = 255 * nodes.LoadImage().load_image(animal.path.name)[0].numpy()
        except Exception:
            # tags in another encoding, odd sizes without coarser colours, damage
            assert animal.shown is None or animal.path.name in ("tags.mkv", "odd_rawvideo.avi")
            continue
        if animal.shown and animal.path.name != "uneven.avif":  # of which stock shows one frame
            assert len(stock) == len(got), animal
        # FFmpeg's guesses at what is wrong differ from run to run, and what a JPEG lacks is grey
        # here
        name = animal.path.name
        guessed = name.startswith("wrong") or (name.startswith("cut") and name.endswith("jpg"))
        for theirs, (_, _, ours) in zip(stock, got, strict=False):
            assert theirs.shape == ours.shape, animal
            assert guessed or np.abs(theirs.mean((0, 1)) - ours.mean((0, 1))).max() < 2, animal
            if animal.shown and not animal.path.name.startswith(MIRRORED):
                assert np.abs(zoo.corners(theirs) - zoo.corners(ours)).max() < 6, animal
        compared += 1
    assert compared > 150


class Clock:
    """Time that passes when somebody waits for it; stands for a feed's `_over`, too."""

    def __init__(self):
        self.now, self._set = 0.0, False

    def __call__(self):
        return self.now

    def is_set(self):
        return self._set

    def set(self):
        self._set = True

    def wait(self, seconds):
        self.now += seconds
        return self._set


def played(path, seconds, fps=1000, loop=True):
    """(when, picture) of what a feed shows in so many seconds of a clock that costs no time."""
    clock, shown = Clock(), []
    feed = FilmFeed(path, fps, loop, clock)
    feed._over = clock
    feed.shapes["1"] = Shape(16, 16)

    def put(frame):
        shown.append((clock.now, frame.picture))
        assert frame.image(Shape(16, 16)).shape == (1, 16, 16, 3)
        if clock.now > seconds or len(shown) > 500:
            clock.set()

    feed.slot.put = put
    feed._run()
    return feed, shown


@pytest.mark.timeless
def test_a_feed_plays_them_all_round_and_round(animals, read):
    for animal in animals:
        got, said, _ = read[animal.path]
        feed, shown = played(animal.path, 1.0)
        if said is not None:
            assert not shown and str(feed.error) == said
            continue
        assert feed.error is None, animal
        span = got[-1][0] + got[-1][1]
        passes = 2 if span < 0.5 else 1
        want = [(k * span + time, p) for k in range(passes) for time, _, p in got if time < 1]
        assert len(shown) >= min(len(want), 2), animal
        for (at, ours), (time, theirs) in zip(shown, want, strict=False):
            assert at == pytest.approx(time, abs=1e-3), animal
            assert np.array_equal(ours, theirs), animal
