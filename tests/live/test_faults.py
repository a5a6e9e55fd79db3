"""A bad frame, edit, picture or task: said in words, counted, and on it goes."""

import asyncio
import os
import random

import inprocess
import pytest
import torch
from films import write_gif
from inprocess import Client, camera, flat, graph, grey, view
from livediffusion.live.cameras import Cameras
from livediffusion.live.view import View

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]


@pytest.fixture
def running(monkeypatch):
    """ComfyUI, and a node whose output is whatever the test puts into `world.gives`."""
    with inprocess.comfy() as (comfy, world):
        world.gives = {}

        def give(self, image, what):
            made = world.gives.get(what)
            return (made(image) if callable(made) else image if made is None else made,)

        members = {
            "INPUT_TYPES": classmethod(
                lambda cls: {"required": {"image": ("IMAGE", {}), "what": ("STRING", {})}}
            ),
            "RETURN_TYPES": ("IMAGE",), "FUNCTION": "give", "CATEGORY": "test", "give": give,
        }  # fmt: skip
        monkeypatch.setitem(inprocess.CLASSES, "TestGive", type("TestGive", (), members))
        number = {
            "INPUT_TYPES": classmethod(lambda cls: {"required": {"what": ("STRING", {})}}),
            "RETURN_TYPES": ("INT",), "FUNCTION": "number", "CATEGORY": "test",
            "number": lambda self, what: (world.gives[what],),
        }  # fmt: skip
        monkeypatch.setitem(inprocess.CLASSES, "TestNumber", type("TestNumber", (), number))
        yield comfy, world


def giving(what="well", **settings):
    made = graph("keep", fps=120, **settings)
    made["6"] = {"class_type": "TestGive", "inputs": {"image": ["4", 0], "what": what}}
    made["5"] = view(["6", 0])
    return made


async def feed(client, until, seconds=15):
    """Camera frames until something is so."""
    for i in range(int(seconds * 100)):
        if until():
            return
        assert client.closed is None, client.states
        await client.send(flat(60 + i % 100))
        await asyncio.sleep(0.01)
    raise AssertionError((client.states, client.stats, client.problems))


def refused(client, kind="picture"):
    return client.stats.get("faults", {}).get(kind, 0)


PICTURES = {
    "two channels": lambda image: image[..., :2],
    "70,000 wide": lambda image: torch.zeros(1, 1, 70_000, 3),
    "70,000 high": lambda image: torch.zeros(1, 70_000, 1, 3),
    "too many pixels": lambda image: torch.zeros(1, 1, 1, 1).expand(1, 9000, 9000, 3),
    "no width": lambda image: image[:, :, :0],
    "no height": lambda image: image[:, :0],
    "no channel": lambda image: image[..., :0],
    "empty batch": lambda image: image[:0],
    "whole numbers": lambda image: (image * 255).to(torch.uint8),
    "true or false": lambda image: image > 0.5,
    "complex": lambda image: image.to(torch.complex64),
    "no batch": lambda image: image[0],
    "a film": lambda image: image[None],
    "a number": lambda image: image.mean(),
    "an array": lambda image: image.numpy(),
    "text": lambda image: "picture",
    "sparse": lambda image: image.to_sparse(),
    "a dict": lambda image: {"samples": image},
}  # fmt: skip


@pytest.mark.parametrize("what", PICTURES)
def test_an_edit_whose_picture_cannot_be_shown_goes_back(running, what):
    comfy, world = running
    world.gives["bad"] = PICTURES[what]

    async def work(http):
        client = await Client.start(http, comfy.url, giving())
        await feed(client, lambda: len(client.views) >= 3)
        assert (await client.post("update", prompt=giving("bad"), workflow={}))[0] == 200
        await feed(client, lambda: client.problems)
        seen = len(client.views)
        await feed(client, lambda: len(client.views) >= seen + 5)
        await client.stop()
        return client

    client = inprocess.live(work)
    (problem,) = client.problems
    assert (problem["kind"], problem["node"], problem["version"]) == ("edit", "5", 2)
    assert problem["reason"].startswith("image: ")
    assert {p.version for p, _ in client.views} == {1}
    assert client.state == "ended" and client.states[-1]["reason"] is None


def test_a_picture_that_cannot_be_shown_ends_only_a_run_that_shows_none(running):
    comfy, world = running
    world.gives["bad"] = PICTURES["two channels"]

    async def work(http):
        client = await Client.start(http, comfy.url, giving("bad"))
        await client.send(flat(9))
        await client.wait(lambda: client.closed)
        return client

    client = inprocess.live(work)
    assert (client.state, client.states[-1]["node"]) == ("failed", "5")
    assert "2 channels" in client.states[-1]["reason"]


@pytest.mark.slow
def test_bad_pictures_among_good_ones_are_counted_and_the_other_view_goes_on(running):
    comfy, world = running
    made = giving()
    made["7"] = view(["3", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, made)

        def told():
            return client.stats.get("faults", {}).get("picture", 0)

        await feed(client, lambda: len(client.views) >= 6)
        for bad in PICTURES.values():
            world.gives["well"] = bad
            seen = len([p for p, _ in client.views if p.view == 1])
            before = refused(client)
            await feed(client, lambda n=seen: sum(p.view == 1 for p, _ in client.views) >= n + 3)
            world.gives["well"] = None
            await feed(client, lambda n=before: refused(client) > n)
            seen = sum(p.view == 0 for p, _ in client.views)
            await feed(client, lambda n=seen: sum(p.view == 0 for p, _ in client.views) > n)
        await client.stop()
        return client

    client = inprocess.live(work)
    told = [p for p in client.problems if p["kind"] == "picture"]
    # once for each time that it began
    assert len(told) == len(PICTURES) and {p["node"] for p in told} == {"5"}
    assert client.stats["faults"]["picture"] >= len(PICTURES) * 2
    assert client.state == "ended"


def test_values_that_are_not_finite_are_shown_as_black_and_white(running):
    comfy, world = running
    world.gives["well"] = lambda image: torch.full_like(image, float("nan"))

    async def work(http):
        client = await Client.start(http, comfy.url, giving())
        await feed(client, lambda: len(client.views) >= 3)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert not client.problems and {grey(p) for p, _ in client.views} == {0}


SETTINGS = [
    -8,
    0,
    15,
    4097,
    10**9,
    32.5,
    float("nan"),
    float("inf"),
    "wide",
    None,
    [32],
    True + 0.5,
]


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_bad_size_that_comes_by_a_wire_goes_back_or_is_left_out(running, side):
    """Today's -8 went past ComfyUI's own check and ended the thread that decodes the camera."""
    comfy, world = running
    wired = giving()
    wired["8"] = {"class_type": "TestNumber", "inputs": {"what": "side"}}
    wired["3"]["inputs"][side] = ["8", 0]

    async def work(http):
        client = await Client.start(http, comfy.url, giving())
        await feed(client, lambda: len(client.views) >= 3)
        for i, bad in enumerate(SETTINGS):
            world.gives["side"] = bad
            await client.post("update", prompt=wired, workflow={})
            await feed(client, lambda n=i: len(client.problems) > n)
            seen = len(client.views)
            await feed(client, lambda n=seen: len(client.views) >= n + 2)
        world.gives["side"] = 48
        await client.post("update", prompt=wired, workflow={})
        last = client.begun["version"] + len(SETTINGS) + 1
        await feed(client, lambda: client.views[-1][0].version == last)
        # while nothing was edited, the size before it stays
        await feed(client, lambda: client.stats.get("version") == last)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert {(p["kind"], p["node"]) for p in client.problems} == {("edit", "3")}
    assert all(p["reason"].startswith(f"{side}: ") for p in client.problems)
    assert client.state == "ended"


def test_a_camera_whose_wired_size_goes_bad_keeps_the_one_before(running):
    comfy, world = running
    wired = giving()
    world.gives["side"] = 48
    wired["9"] = {"class_type": "TestSide", "inputs": {}}
    wired["3"]["inputs"]["width"] = ["9", 0]
    inprocess.CLASSES["TestSide"] = type("TestSide", (), {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {}}), "RETURN_TYPES": ("INT",),
        "FUNCTION": "go", "CATEGORY": "test", "LIVE_SOURCE": False,
        "go": lambda self: (world.gives["side"],)})  # fmt: skip

    async def work(http):
        client = await Client.start(http, comfy.url, wired)
        await feed(client, lambda: len(client.views) >= 3)
        run = comfy.sessions.get(client.begun["session"]).frames
        for bad in SETTINGS:
            image = run.image("3", bad, 32, "crop", False)[0]
            assert image.shape == (1, 32, 48, 3)
        seen = len(client.views)
        await feed(client, lambda: len(client.views) >= seen + 3)
        await client.wait(lambda: client.stats.get("faults", {}).get("setting") == len(SETTINGS))
        await client.stop()
        return client

    client = inprocess.live(work)
    assert {(p["kind"], p["node"]) for p in client.problems} == {("setting", "3")}
    assert client.state == "ended"


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_number_by_a_wire_goes_back_or_leaves_frames_out(running, late):
    """The nodes' own door (nodes/ranges.py): at an edit, and of a number that changes later."""
    comfy, world = running
    world.gives["now"] = 80
    members = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {"image": ("IMAGE", {})}}),
        "RETURN_TYPES": ("INT",), "FUNCTION": "go", "CATEGORY": "test",
        "go": lambda self, image: (world.gives["now"],),
    }  # fmt: skip
    inprocess.CLASSES["TestMoving"] = type("TestMoving", (), members)
    wired = giving()
    wired["8"] = {"class_type": "TestMoving", "inputs": {"image": ["3", 0]}}
    wired["5"]["inputs"]["quality"] = ["8", 0]
    bad = [float("nan"), float("inf"), 0, 101, 50.5, "wide", None]

    async def work(http):
        client = await Client.start(http, comfy.url, wired if late else giving())
        await feed(client, lambda: len(client.views) >= 3)
        for i, value in enumerate(bad):
            world.gives["now"] = value
            if not late:
                await client.post("update", prompt=wired, workflow={})
            await feed(client, lambda n=i: len(client.problems) > n)
            world.gives["now"] = 80
            seen = len(client.views)
            await feed(client, lambda n=seen: len(client.views) >= n + 2)
        await client.stop()
        return client

    client = inprocess.live(work)
    told = {(p["kind"], p["node"]) for p in client.problems}
    assert told == {("picture" if late else "edit", "5")} and len(client.problems) == len(bad)
    assert all(p["reason"].startswith("quality: ") for p in client.problems)
    assert client.state == "ended" and client.states[-1]["reason"] is None


def edits(dice, made):
    """A graph with one thing changed: what a user, or a script, may do to it."""
    made = {name: {**node, "inputs": {**node["inputs"]}} for name, node in made.items()}
    name = dice.choice(list(made))
    inputs = made[name]["inputs"]
    field = dice.choice(list(inputs))
    kind = dice.randrange(6)
    if kind == 0:
        del made[name]
    elif kind == 1:
        del inputs[field]
    elif kind == 2:
        inputs[field] = dice.choice(
            [-8, 0, 10**12, 3.5, float("inf"), "", "x" * 3000, None, True, [], {}, ["nobody", 0]]
        )
    elif kind == 3:
        inputs[field] = [dice.choice(list(made)), dice.choice([0, 1, 7, -1])]
    elif kind == 4:
        made[name]["class_type"] = dice.choice(["TestWork", "LiveView", "LiveCamera", "None"])
    else:
        new = dice.choice(["50", "51", "9"])
        made[new] = made.pop(name)
        for node in made.values():
            for key, value in node["inputs"].items():
                if isinstance(value, list) and value[:1] == [name]:
                    node["inputs"][key] = [new, *value[1:]]
    return made


def test_any_edit_is_refused_taken_back_or_runs(running):
    """However wrong: after each the run has frames again, and a sound edit takes over."""
    comfy, world = running
    dice = random.Random(int(os.environ.get("LIVEDIFFUSION_SEED", "1")))
    world.gives["bad"] = PICTURES["two channels"]
    world.fail = "no such prompt"
    outcomes = []

    async def work(http):
        client = await Client.start(http, comfy.url, giving())
        await feed(client, lambda: len(client.views) >= 2)
        for _ in range(int(os.environ.get("LIVEDIFFUSION_EDITS", "60"))):
            status, answer = await client.post("update", prompt=edits(dice, giving()), workflow={})
            assert status in (200, 400), answer
            if status == 200:
                version, told = answer["version"], len(client.problems)

                def over(version=version, told=told):
                    seen = any(p.version == version for p, _ in client.views[-3:])
                    return seen or len(client.problems) > told

                await feed(client, over)
                outcomes.append("taken back" if len(client.problems) > told else "runs")
            else:
                assert answer["error"]["message"]
                outcomes.append("refused")
            seen = len(client.views)
            await feed(client, lambda n=seen: len(client.views) > n)
        status, answer = await client.post("update", prompt=giving(), workflow={})
        await feed(client, lambda: client.views[-1][0].version == answer["version"])
        await client.stop()
        return client

    client = inprocess.live(work)
    assert client.state == "ended" and client.states[-1]["reason"] is None
    assert {"refused", "runs"} <= set(outcomes)


def test_a_film_that_breaks_is_told_and_the_camera_goes_on(running, tmp_path, monkeypatch):
    comfy, _ = running
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    write_gif(tmp_path / "a.gif", 6, 40)
    both = giving()
    both["7"] = camera(source="file", file="a.gif", fps=60)
    both["8"] = view(["7", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, both)
        await feed(client, lambda: {p.view for p, _ in client.views} == {0, 1})
        run = comfy.sessions.get(client.begun["session"])
        film = run.shared.feed_of["7"]
        monkeypatch.setattr(film, "_play", lambda *given: 1 / 0)
        await feed(client, lambda: client.problems)
        seen = len(client.views)
        await feed(client, lambda: len(client.views) >= seen + 8)
        await client.wait(lambda: "7" in client.stats.get("silent", ()))
        await client.stop()
        return client

    client = inprocess.live(work)
    (problem,) = client.problems
    assert (problem["kind"], problem["node"]) == ("source", "7")
    assert "division by zero" in problem["reason"] and client.stats["faults"] == {"source": 1}
    assert client.state == "ended"


# how each of a session's background tasks is made to raise, and what is seen of it
TASKS = {
    "statistics": (Cameras, "tell_pace"),
    "camera": (Cameras, "_decoded"),
    "view 5": (View, "_served"),
    "compare": (View, "compare"),
}


@pytest.mark.parametrize("times", [1, 10**9])
@pytest.mark.parametrize("task", TASKS)
def test_a_background_task_that_raises_is_told_and_begun_again(running, monkeypatch, task, times):
    """Or, where it goes on to raise, the run ends with words; never silently dead."""
    comfy, _ = running
    owner, name = TASKS[task]
    whole, raised = getattr(owner, name), []

    def broken(self, *args):
        if len(raised) < times:
            raised.append(1)
            raise RuntimeError("it broke")
        return whole(self, *args)

    async def work(http):
        client = await Client.start(http, comfy.url, giving())
        await feed(client, lambda: len(client.views) >= 3)
        monkeypatch.setattr(owner, name, broken)
        if task == "compare":
            await client.compare()
        if times == 1 or task == "compare" or task.startswith("view"):
            await feed(client, lambda: client.problems)
            seen = len(client.views)
            monkeypatch.setattr(owner, name, whole)
            await feed(client, lambda: len(client.views) >= seen + 5)
            await client.stop()
            return client
        while not client.closed:
            await client.send(flat(9))
            await asyncio.sleep(0.02)
        return client

    client = inprocess.live(work)
    assert raised
    assert "it broke" in client.problems[0]["reason"]
    kind, node = ("picture", "5") if task == "view 5" else ("task", None)
    assert (client.problems[0]["kind"], client.problems[0]["node"]) == (kind, node)
    ended = client.states[-1]
    if times == 1 or task in ("compare", "view 5"):
        assert ended["state"] == "ended" and ended["reason"] is None
    else:
        assert "it broke" in ended["reason"] and task in ended["reason"]


def test_every_background_task_was_made_to_raise():
    """Each `keep` of the source is one of the tasks above, or has a test of its own."""
    import ast
    import inspect

    from livediffusion.live import session, sessions

    found = set()
    for module in (session, sessions):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "keep":
                found.add(ast.unparse(node.args[0]).strip("'\"f"))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "create_task":
                # the second only waits, and closes whatever comes of that
                assert "_watched" in ast.unparse(node) or "_leave" in ast.unparse(node)
    assert found == {"statistics", "camera", "view {node}", "compare", "queue"}


def test_a_queue_that_cannot_be_followed_ends_the_run_in_words(running, monkeypatch):
    comfy, _ = running
    from livediffusion.live import sessions

    async def broken(self, session):
        raise RuntimeError("no queue")

    monkeypatch.setattr(sessions.Sessions, "_follow", broken)

    async def work(http):
        client = await Client.start(http, comfy.url, giving())
        await client.wait(lambda: client.closed)
        return client

    client = inprocess.live(work)
    assert "queue: no queue" in client.states[-1]["reason"]
