"""A zoo of files: each is shown as ComfyUI's own loaders show it, or refused in one sentence."""

import io
import itertools
import os

import av
import filming
import inprocess
import numpy as np
import pytest
import zoo
from livediffusion.live.feeds import FilmFeed
from livediffusion.live.media.folder import PICTURES
from livediffusion.live.media.reader import stills
from livediffusion.live.media.still import Damage, Unreadable
from livediffusion.live.pictures import Shape, fitted
from PIL import Image

SEED = int(os.environ.get("LIVEDIFFUSION_ZOO", "0"))  # where files are cut off and made wrong
# every how many go through whole runs; 1 for all of them
STEP = int(os.environ.get("LIVEDIFFUSION_ZOO_STEP", "6"))
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
            assert np.abs(filming.corners(got[0][2]) - filming.CORNERS).max() < 14, animal


@pytest.mark.timeless
@pytest.mark.comfy
@pytest.mark.slow
@pytest.mark.slow
def test_it_is_what_comfyui_shows(animals, read, monkeypatch):
    import folder_paths

    import nodes

    monkeypatch.setattr(folder_paths, "input_directory", str(animals[0].path.parent))
    compared = 0
    for animal in animals:
        got, said, _ = read[animal.path]
        # on wrong bytes stock may end the process, and FFmpeg's guesses differ from run to run
        if said is not None or animal.path.name.startswith("wrong"):
            continue
        try:
            stock = 255 * nodes.LoadImage().load_image(animal.path.name)[0].numpy()
        except Exception:
            # tags in another encoding, odd sizes without coarser colours, damage
            assert animal.shown is None or animal.path.name in ("tags.mkv", "odd_rawvideo.avi")
            continue
        if animal.shown and animal.path.name != "uneven.avif":  # of which stock shows one frame
            assert len(stock) == len(got), animal
        # a film that is cut off ends in guesses, too; what a JPEG lacks is grey here
        name, ending = animal.path.name, animal.path.suffix
        cut = len(got) if not name.startswith("cut") or ending in PICTURES else len(got) - 2
        for i, (theirs, (_, _, ours)) in enumerate(zip(stock, got, strict=False)):
            assert theirs.shape == ours.shape, animal
            guessed = not animal.shown and (i >= cut or ending == ".jpg")
            assert guessed or np.abs(theirs.mean((0, 1)) - ours.mean((0, 1))).max() < 2, animal
            if animal.shown and not animal.path.name.startswith(MIRRORED):
                assert np.abs(filming.corners(theirs) - filming.corners(ours)).max() < 6, animal
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
            # twice the same, unless FFmpeg guessed
            assert animal.shown is None or np.array_equal(ours, theirs), animal


@pytest.mark.timeless
@pytest.mark.comfy
@pytest.mark.slow
def test_clip_reads_them_all(comfyui, animals, read):
    from livediffusion.demo import clip

    for animal in animals:
        got, said, _ = read[animal.path]
        if said is not None:
            with pytest.raises(clip.Failed) as refused:
                clip.read(animal.path, 100, 32)
            assert str(refused.value) == said.replace("file:", "--video:"), animal
            continue
        taken = clip.read(animal.path, 100, 32)
        want = [time for time, _, _ in got] + [got[-1][0] + got[-1][1]]
        assert taken.times == pytest.approx(want, abs=1e-6), animal
        for ours, (_, _, picture) in zip(taken.frames, got, strict=True):
            apart = np.asarray(ours).mean((0, 1)) - fitted(picture, Shape(32, 32)).mean((0, 1))
            # one filter is sharper than the other
            alike = np.abs(apart).max() < 6 or min(picture.shape[:2]) < 8
            assert animal.shown is None or alike, animal


def first(got, size=32):
    """What a Live Camera of size x size shows first of a file, as a mean per channel."""
    return fitted(got[0][2], Shape(size, size)).mean((0, 1))


@pytest.fixture(scope="module")
def running(animals):
    with inprocess.comfy() as (comfy, _), pytest.MonkeyPatch.context() as patch:
        import folder_paths

        patch.setattr(folder_paths, "input_directory", str(animals[0].path.parent))
        seen = []
        work = inprocess.CLASSES["TestSave"]
        patch.setattr(
            work, "go", lambda self, image: seen.append(image[0].numpy() * 255) or {"ui": {}}
        )
        yield comfy, seen


@pytest.mark.comfy
@pytest.mark.slow
@pytest.mark.slow
def test_live_camera_as_an_ordinary_node_shows_them_all(running, animals, read):
    comfy, seen = running
    for animal in animals[:: STEP // 2 or 1]:
        got, said, _ = read[animal.path]
        graph = {
            "1": inprocess.camera(source="file", file=animal.path.name),
            "2": {"class_type": "TestSave", "inputs": {"image": ["1", 0]}},
        }
        seen.clear()
        status = comfy.wait_for(comfy.put(graph, ["2"]))["status"]
        if said is not None:
            errors = [data for event, data in status["messages"] if event == "execution_error"]
            assert [e["exception_message"].strip() for e in errors] == [said], animal
            continue
        assert status["status_str"] == "success", (animal, status)
        alike = np.abs(seen[0].mean((0, 1)) - first(got)).max() < 1
        assert animal.shown is None or alike, animal


@pytest.mark.comfy
@pytest.mark.slow
@pytest.mark.slow
def test_a_live_run_goes_through_them_all_and_is_not_lost(running, animals, read):
    """Each file by an edit of the running graph: shown, or refused in its sentence."""
    comfy, _ = running

    async def work(http):
        def graph(name):
            return {
                "3": inprocess.camera(source="file", file=name),
                "5": inprocess.view(["3", 0], quality=100),
            }

        client = await inprocess.Client.start(http, comfy.url, graph("ntsc.mp4"))
        await client.wait(lambda: client.views)
        for animal in animals[::STEP]:
            got, said, _ = read[animal.path]
            edit = {"prompt": graph(animal.path.name), "workflow": {}}
            status, answer = await client.post("update", **edit)
            if said is not None:
                assert status == 400, animal
                assert answer["node_errors"]["3"]["errors"][0]["message"] == said
                continue
            assert status == 200, (animal, answer)
            version = answer["version"]
            await client.wait(lambda v=version: client.views[-1][0].version >= v)
            packet = next(p for p, _ in client.views if p.version >= version)
            shown = np.asarray(Image.open(io.BytesIO(packet.payload)).convert("RGB"), float)
            # a film may be further on when it is taken over
            near = [fitted(p, Shape(32, 32)).mean((0, 1)) for _, _, p in got]
            off = min(np.abs(shown.mean((0, 1)) - mean).max() for mean in near)
            assert animal.shown is None or off < 4, animal
            del client.views[:-1]
        assert client.state == "live" and not client.problems
        await client.stop()
        return client

    assert inprocess.live(work).state == "ended"


@pytest.mark.comfy
@pytest.mark.slow
@pytest.mark.slow
def test_a_live_run_does_not_begin_with_what_cannot_be_shown(running, animals, read):
    comfy, _ = running
    refused = [a for a in animals if read[a.path][1] is not None]

    async def work(http):
        for animal in refused[::STEP]:
            graph = {
                "3": inprocess.camera(source="file", file=animal.path.name),
                "5": inprocess.view(["3", 0]),
            }
            url = f"{comfy.url}/livediffusion/start"
            status, answer = await inprocess.post(http, url, inprocess.begin(graph))
            assert status == 400 and answer["error"]["message"] == read[animal.path][1]

    assert len(refused) > 20
    inprocess.live(work)


@pytest.mark.comfy
@pytest.mark.slow
def test_an_edit_of_the_camera_does_not_begin_its_film_again(running, animals):
    """Rate, loop and size are edited; a film of ever brighter frames never goes back to black."""
    comfy, _ = running
    path = animals[0].path.with_name("ramp.webp")
    ramp = [Image.new("RGB", (32, 32), (i, i, i)) for i in range(0, 250, 2)]
    ramp[0].save(path, save_all=True, append_images=ramp[1:], duration=40, lossless=True)

    async def work(http):
        def graph(**settings):
            return {
                "3": inprocess.camera(source="file", file=path.name, **settings),
                "5": inprocess.view(["3", 0], quality=100),
            }

        client = await inprocess.Client.start(http, comfy.url, graph(fps=60))
        await client.wait(lambda: client.views and inprocess.grey(client.views[-1][0]) > 30)
        edits = ({"fps": 10}, {"loop": False}, {"fps": 60}, {"width": 64, "mirror": True})
        for edit in edits:
            _, answer = await client.post("update", prompt=graph(**edit), workflow={})
            await client.wait(lambda v=answer["version"]: client.views[-1][0].version >= v)
        await client.stop()
        return client

    client = inprocess.live(work)
    greys = [inprocess.grey(packet) for packet, _ in client.views]
    # five seconds of film, of which this takes two
    assert all(b >= a - 2 for a, b in itertools.pairwise(greys)), greys
    assert client.stats["refused"] == 0 and not client.problems


@pytest.mark.comfy
@pytest.mark.slow
def test_what_is_damaged_in_a_live_run_is_counted_and_the_run_goes_on(running, animals):
    comfy, _ = running
    path = filming.film(animals[0].path.with_name("torn.mov"), "png", "rgb24", frames=6)
    with av.open(str(path)) as film:
        torn = [p for p in film.demux(video=0) if p.size][3]
    data = bytearray(path.read_bytes())
    data[torn.pos : torn.pos + 40] = bytes(40)
    path.write_bytes(data)

    async def work(http):
        graph = {
            "3": inprocess.camera(source="file", file=path.name),
            "5": inprocess.view(["3", 0]),
        }
        client = await inprocess.Client.start(http, comfy.url, graph)
        await client.wait(lambda: client.stats.get("refused", 0) >= 2)
        assert client.state == "live"
        # a file that goes away is said, with its name, where it would begin again
        path.unlink()
        await client.wait(lambda: client.closed)
        return client

    client = inprocess.live(work)
    assert client.states[-1]["reason"] == "file: torn.mov is not there, or not any more."
    assert (client.state, client.states[-1]["node"]) == ("failed", "3")
