"""Live Keep and Live Last with stock nodes, on the real executor: prompts, and live runs."""

import collections
import copy
import gc
import random
import types
import weakref

import inprocess
import pytest
import torch
from inprocess import Client, camera, flat, grey, view

pytestmark = [pytest.mark.comfy, pytest.mark.timeless]


@pytest.fixture
def running(monkeypatch):
    """ComfyUI, what nodes of the graphs below saw, and what makes them fail."""
    import nodes
    from comfy_extras.nodes_post_processing import Blend  # isort: skip - they import each other
    from comfy_extras.nodes_latent import LatentAdd, LatentMultiply
    from livediffusion.nodes import keep

    world = types.SimpleNamespace(seen=collections.defaultdict(list), fail=None, next=0)

    def add(name, inputs, returns, function, **members):
        members |= {
            "INPUT_TYPES": classmethod(lambda cls: {"required": inputs}), "FUNCTION": "go",
            "RETURN_TYPES": returns, "CATEGORY": "test",
            "go": lambda self, **values: function(**values),
        }  # fmt: skip
        inprocess.CLASSES[name] = type(name, (), members)

    def probe(value, name):
        tensor = value["samples"] if isinstance(value, dict) else value
        world.seen[name].append(tensor.clone())
        return (value,)

    def fails(value, after):
        if world.fail == len(world.seen["in"]):
            raise world.error
        return (value,)

    def frame():
        world.next += 1
        return (torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(world.next)),)

    with inprocess.comfy() as (comfy, _):
        for node in (keep.LiveKeep, keep.LiveLast):
            inprocess.CLASSES[node.__name__] = node
        for node in (LatentAdd, LatentMultiply, Blend):
            inprocess.CLASSES[node.define_schema().node_id] = node
        for node in ("LatentBlend", "EmptyImage"):
            inprocess.CLASSES[node] = getattr(nodes, node)
        text, any_ = ("STRING", {}), ("*", {})
        add("Probe", {"value": any_, "name": text}, ("*",), probe)
        add("Out", {"value": any_}, (), lambda value: {"ui": {}}, OUTPUT_NODE=True)
        add("Fails", {"value": any_, "after": any_}, ("*",), fails)
        add("Frame", {}, ("IMAGE",), frame, IS_CHANGED=classmethod(lambda cls: float("nan")))
        add("Enter", {"image": ("IMAGE", {})}, ("LATENT",),
            lambda image: ({"samples": image.movedim(-1, 1) * 2 - 1},))  # fmt: skip
        add("Leave", {"latent": ("LATENT", {})}, ("IMAGE",),
            lambda latent: ((latent["samples"].movedim(1, -1) + 1) / 2,))  # fmt: skip
        yield comfy, world


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def keep(value, name="a"):
    return node("LiveKeep", value=value, name=name)


def last(first, name="a"):
    return node("LiveLast", name=name, first=first)


def blend(a, b, factor, mode="normal"):
    return node("ImageBlend", image1=a, image2=b, blend_factor=factor, blend_mode=mode)


IN = ["in", 0]

# by name: nodes between "in", the picture of a frame, and what is shown; its reference is a
# function of the frame's picture x and the one before it, and of what was kept
GRAPHS = {
    "feedback": (
        {"b": last(IN), "c": blend(IN, ["b", 0], 0.7), "k": keep(["c", 0])}, ["c", 0],
        lambda x, b, k: [0.3 * x + 0.7 * (x if k is None else k)] * 2),
    "trails": (
        {"0": node("EmptyImage", width=32, height=32, batch_size=1, color=0),
         "b": last(["0", 0]), "c": blend(["b", 0], ["0", 0], 0.1),
         "d": blend(IN, ["c", 0], 1.0, "screen"), "k": keep(["d", 0])}, ["d", 0],
        lambda x, b, k: [1 - (1 - x) * (1 - 0.9 * (x * 0 if k is None else k))] * 2),
    "echo": (
        {"k": keep(IN), "b": last(IN), "c": blend(IN, ["b", 0], 0.5)}, ["c", 0],
        lambda x, b, k: [0.5 * x + 0.5 * (x if b is None else b), x]),
    "difference": (
        {"b": last(IN), "k": keep(IN), "c": blend(IN, ["b", 0], 1.0, "difference")}, ["c", 0],
        lambda x, b, k: [(x - (x if b is None else b)).clamp(0, 1), x]),
    # nothing but the name leads from the camera to the view
    "delay": (
        {"0": node("EmptyImage", width=32, height=32, batch_size=1, color=0),
         "b": last(["0", 0]), "k": keep(IN)}, ["b", 0],
        lambda x, b, k: [x * 0 if b is None else b, x]),
    # by way of a second name, which is one more frame
    "two": (
        {"k": keep(IN), "b": last(IN), "k2": keep(["b", 0], "b"),
         "b2": last(IN, "b"), "c": blend(["b2", 0], IN, 0.5)}, ["c", 0],
        None),
    "latent": (
        {"e": node("Enter", image=IN), "b": last(["e", 0]),
         "c": node("LatentBlend", samples1=["e", 0], samples2=["b", 0], blend_factor=0.4),
         "k": keep(["c", 0]), "d": node("Leave", latent=["c", 0])}, ["d", 0],
        lambda x, b, k: [0.4 * x + 0.6 * (x if k is None else k)] * 2),
    "latent sum": (
        {"e": node("Enter", image=IN), "b": last(["e", 0]),
         "m": node("LatentMultiply", samples=["b", 0], multiplier=0.5),
         "c": node("LatentAdd", samples1=["m", 0], samples2=["e", 0]), "k": keep(["c", 0]),
         "d": node("Leave", latent=["c", 0])}, ["d", 0],
        # of values that run from -1 to 1
        lambda x, b, k: [0.5 * ((x if k is None else k) * 2 - 1) * 0.5 + x] * 2),
}  # fmt: skip


def graph(name, end, source, **more):
    """One of GRAPHS, its frames and what it shows seen by probes; its nodes in any order."""
    parts, shown, _ = GRAPHS[name]
    made = {"0s": source, "in": node("Probe", value=["0s", 0], name="in"), **parts,
            "out": node("Probe", value=shown, name="out"), "end": end, **more}  # fmt: skip
    names = list(made)
    random.Random(name).shuffle(names)
    return {n: made[n] for n in names}


def queued(comfy, made, workflow):
    """The history entry of a graph as an ordinary prompt of this workflow."""
    made = copy.deepcopy(made)  # the executor writes into it
    ends = [n for n in made if made[n]["class_type"] in ("Out", "LiveKeep")]
    return comfy.wait_for(comfy.put(made, ends, {"extra_pnginfo": {"workflow": {"id": workflow}}}))


def expected(name, frames, well=None):
    """Pictures that a graph of GRAPHS makes of these, the runs that fail left out of what is kept.

    Args:
        well: by frame, whether its run went well.
    """
    out, before, kept = [], [], None
    for i, x in enumerate(frames):
        if name == "two":
            lag = [before[-j] if len(before) >= j else x for j in (1, 2)]
            made, keeps = 0.5 * lag[1] + 0.5 * x, x
            if len(before) == 1:
                made = 0.5 * before[0] + 0.5 * x
        else:
            made, keeps = GRAPHS[name][2](x, before[-1] if before else None, kept)
        out.append(made)
        if well is None or well[i]:
            before.append(x)
            kept = keeps
    return out


def agree(world, name, well=None):
    frames, out = world.seen["in"], world.seen["out"]
    for i, (got, wanted) in enumerate(zip(out, expected(name, frames, well), strict=False)):
        assert torch.allclose(got, wanted, atol=1e-5), (name, i)
    return len(out)


async def sent(client, greys, size=32):
    for value in greys:
        seen = client.stats.get("frames", 0), len(client.views)
        await client.send(flat(value, size))
        await client.wait(lambda n=seen: len(client.views) > n[1])


async def edit(comfy, client, made):
    """The edited graph, and frames run on it from now on."""
    status, answer = await client.post("update", prompt=made, workflow={})
    assert status == 200, answer
    shared = comfy.sessions.get(client.begun["session"]).shared
    await client.wait(lambda: shared.version == answer["version"])
    return answer


GREYS = [20, 200, 90, 240, 10, 130, 60]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_live_run(running, name):
    comfy, world = running

    async def work(http):
        client = await Client.start(
            http, comfy.url, graph(name, view(["out", 0]), camera(fps=120))
        )
        await sent(client, GREYS)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert client.state == "ended" and not client.problems
    assert agree(world, name) == len(GREYS)
    if name == "difference":
        assert [grey(p) for p, _ in client.views][1] > 100


@pytest.mark.parametrize("name", GRAPHS)
def test_prompts_one_after_another(running, name):
    comfy, world = running
    made = graph(name, node("Out", value=["out", 0]), node("Frame"))
    for _ in range(5):
        done = queued(comfy, made, name)
        assert done["status"]["status_str"] == "success", done
    assert agree(world, name) == 5


def test_prompts_of_other_workflows_and_names_do_not_meet(running):
    comfy, world = running

    def run(workflow, name):
        made = graph("delay", node("Out", value=["out", 0]), node("Frame"))
        for one in made.values():
            if one["class_type"] in ("LiveKeep", "LiveLast"):
                one["inputs"] = {**one["inputs"], "name": name}
        queued(comfy, made, workflow)

    order = [("v", "a"), ("w", "a"), ("v", "b"), ("v", "a"), ("w", "a"), ("v", "b")]
    for workflow, name in order:
        run(workflow, name)
    frames, out = world.seen["in"], world.seen["out"]
    for i, one in enumerate(order):
        before = order[:i][::-1].index(one) if one in order[:i] else None
        wanted = frames[0] * 0 if before is None else frames[i - 1 - before]
        assert torch.equal(out[i], wanted), i


def test_a_prompt_that_fails_or_is_cancelled_leaves_the_old_one(running):
    import comfy.model_management

    served, world = running
    # what fails waits for what is kept and what is shown
    made = graph("feedback", node("Out", value=["x", 0]), node("Frame"),
                 x=node("Fails", value=["out", 0], after=["k", 0]))  # fmt: skip
    errors = [RuntimeError("no"), comfy.model_management.InterruptProcessingException()]
    well = []
    for i in range(1, 9):
        world.fail, world.error = i // 2 * 2, errors[i // 2 % 2]
        done = queued(served, made, "failing")
        well.append(done["status"]["status_str"] == "success")
    assert well == [True, False] * 4
    assert agree(world, "feedback", well) == 8


def test_a_frame_that_fails_leaves_the_old_one(running):
    from livediffusion.live.faults import Refused

    comfy, world = running
    world.error = Refused("value: not this frame")
    made = graph("feedback", view(["x", 0]), camera(fps=120),
                 x=node("Fails", value=["out", 0], after=["k", 0]))  # fmt: skip

    async def work(http):
        client = await Client.start(http, comfy.url, made)
        await sent(client, GREYS[:2])
        world.fail = 3
        await client.send(flat(255))
        await client.wait(lambda: client.problems)
        await sent(client, GREYS[2:])
        await client.stop()
        return client

    client = inprocess.live(work)
    well = [i != 2 for i in range(len(world.seen["in"]))]
    assert len(well) == len(GREYS) + 1 and agree(world, "feedback", well) == len(well)
    assert client.state == "ended"


def test_edits_while_live(running):
    """Strength changes at once; another name begins anew; what nobody asks for rests."""
    comfy, world = running

    def made(factor=0.5, name="a", asked=True):
        parts = graph("feedback", view(["out", 0]), camera(fps=120))
        parts |= {"b": last(IN, name), "c": blend(IN, ["b", 0], factor),
                  "kp": node("Probe", value=["c", 0], name="kept"),
                  "k": keep(["kp", 0], name)}  # fmt: skip
        if not asked:
            parts["out"] = node("Probe", value=IN, name="out")
        return parts

    async def work(http):
        client = await Client.start(http, comfy.url, made())
        await sent(client, [0, 100])
        await edit(comfy, client, made(0.9))
        await sent(client, [200])
        await edit(comfy, client, made(name="b"))
        await sent(client, [40])
        await edit(comfy, client, made(1.0, "b"))
        await sent(client, [240])
        answer = await edit(comfy, client, made(asked=False))
        assert {one["node"] for one in answer["idle"]} == {"k"}
        await sent(client, [50])
        await client.stop()

    inprocess.live(work)
    out = [round(float(one.mean()) * 255) for one in world.seen["out"]]
    assert out == [0, 50, 65, 40, 40, 50]
    assert len(world.seen["kept"]) == 5


def test_another_size_while_live_begins_anew(running):
    comfy, world = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph(
            "feedback", view(["out", 0]), camera(fps=120)))  # fmt: skip
        await sent(client, GREYS[:3])
        other = graph("feedback", view(["out", 0]), camera(fps=120, width=64, height=48))
        await edit(comfy, client, other)
        await sent(client, GREYS[3:])
        await client.stop()

    inprocess.live(work)
    out, frames = world.seen["out"], world.seen["in"]
    wide = [i for i, one in enumerate(out) if one.shape[1:3] == (48, 64)]
    assert len(wide) == len(GREYS) - 3 and len(out) == len(GREYS)
    for part in (slice(0, 3), slice(3, None)):
        for got, wanted in zip(out[part], expected("feedback", frames[part]), strict=True):
            assert torch.allclose(got, wanted, atol=1e-5)


def test_only_what_is_asked_for_by_its_name_is_kept_in_a_frame(running):
    """Over several names, over names that come by a link, and no more."""
    from livediffusion.live.executor import NodeKinds
    from livediffusion.live.graph import split

    made = {
        "in": camera(), "v": view(["l1", 0]), "l1": last(IN, "a"), "k1": keep(["l2", 0], " a "),
        "l2": last(IN, "b"), "k2": keep(["f", 0], "b"), "k3": keep(IN, "c"),
        "l3": last(["in", 0], "c"), "f": node("Fails", value=["0", 0], after=["0", 0]),
        "0": node("EmptyImage", width=32, height=32, batch_size=1, color=0),
    }  # fmt: skip
    cut = split(made, NodeKinds())
    assert (cut.keeps, cut.idle) == (["k1", "k2"], ["k3"])
    # what does not hang on the camera is kept anew in each frame all the same, made once
    assert cut.live == {"in", "v", "l1", "l2", "k1", "k2"} and cut.frozen == {"f", "0"}
    assert cut.handover == [("f", 0), ("0", 0)]
    made["l2"]["inputs"]["name"] = ["0", 0]
    assert split(made, NodeKinds()).keeps == ["k1", "k2", "k3"]
    made["l2"]["inputs"]["name"], made["k3"]["inputs"]["name"] = "b", ["0", 0]
    assert split(made, NodeKinds()).keeps == ["k1", "k3", "k2"]
    # behind a view it is run by the view
    made["v"] = view(["k1", 0])
    assert split(made, NodeKinds()).keeps == ["k2", "k3"]


def test_runs_have_their_own_and_leave_nothing(running):
    from livediffusion.host.registry import streams

    comfy, world = running
    made = graph("delay", view(["out", 0]), camera(fps=120))

    async def work(http):
        for _ in range(2):
            client = await Client.start(http, comfy.url, made, workflow="same")
            await sent(client, GREYS[:3])
            session = client.begun["session"]
            assert len(streams.owned(session)) == 1
            await client.stop()
            await client.wait(lambda own=session: not streams.owned(own))

    inprocess.live(work)
    black = [not one.any() for one in world.seen["out"]]
    assert black == [True, False, False] * 2


@pytest.mark.parametrize("wrong", ["empty", "twice", "kind", "loose"])
def test_what_is_wrong_is_said_at_its_node(running, wrong):
    comfy, _ = running
    made = graph("feedback", view(["out", 0]), camera(fps=120))
    fine, said = dict(made), {
        "empty": ({"k", "b"}, "name: it is empty"), "loose": None,
        "twice": ({"k", "k2"}, "name: another Live Keep"),
        "kind": ({"b2"}, "first: expected an IMAGE"),
    }[wrong]  # fmt: skip
    made |= {
        "empty": {"k": keep(["c", 0], " "), "b": last(IN, " ")},
        "twice": {"k": keep(["c", 0]), "k2": keep(["k", 0])},
        "kind": {"e": node("Enter", image=IN), "b2": last(["e", 0]),
                 "d": node("Leave", latent=["b2", 0]), "out": blend(["c", 0], ["d", 0], 0.5)},
        # one that is not wired yet holds nobody up
        "loose": {"k2": node("LiveKeep", name="other"), "b2": node("LiveLast", name="other")},
    }[wrong]  # fmt: skip

    async def work(http):
        client = await Client.start(http, comfy.url, fine)
        await sent(client, GREYS[:2])
        await edit(comfy, client, made)
        # a name is kept under twice in the second frame at the latest
        for value in GREYS[2:5]:
            await client.send(flat(value))
            await client.wait(lambda: client.answers == client.sequence)
        if wrong != "loose":
            await client.wait(lambda: client.problems)
        await sent(client, GREYS[5:])
        await client.stop()
        return client

    client = inprocess.live(work)
    assert client.state == "ended"
    problems = [(one["node"], one["reason"]) for one in client.problems]
    if said is None:
        assert not problems
    else:
        assert problems[0][0] in said[0] and problems[0][1].startswith(said[1])


def test_a_skipped_frame_keeps_nothing_and_skips_what_is_kept(running):
    """Wired on to the filter it is a part of the pipeline, and rests with it."""
    comfy, world = running
    made = graph("feedback", view(["f", 0]), camera(fps=120), f=node(
        "LiveSimilarityFilter", image=["0s", 0], processed=["k", 0], threshold=0.9, max_skip=1000,
        settle=1, measure="centred", seed=0), p=node("Probe", value=["c", 0], name="c"),
        k=keep(["p", 0]))  # fmt: skip

    async def work(http):
        client = await Client.start(http, comfy.url, made)
        for _ in range(2000):
            if client.stats.get("skipped", 0) >= 10:
                break
            await client.send(flat(100))
            await client.wait(lambda: client.answers == client.sequence)
        else:
            raise AssertionError(client.stats)
        await sent(client, [200])
        await client.stop()

    inprocess.live(work)
    out = [round(float(one.mean()) * 255) for one in world.seen["c"]]
    assert out[-1] == 130 and set(out[:-1]) == {100} and len(out) < 6


def test_many_frames_keep_one(running, monkeypatch):
    """What is kept does not grow: of each name one value, and the one that comes."""
    from livediffusion.host.frames.keep import Kept

    comfy, _ = running
    before, given = Kept.keep, []

    def noted(self, turn, node, name, value):
        given.append(weakref.ref(value))
        before(self, turn, node, name, value)

    monkeypatch.setattr(Kept, "keep", noted)

    async def work(http):
        client = await Client.start(http, comfy.url, graph(
            "feedback", view(["out", 0]), camera(fps=120)))  # fmt: skip
        await sent(client, list(range(40)))
        there = sum(one() is not None for one in given)
        await client.stop()
        return there

    assert inprocess.live(work) <= 4 and len(given) == 40
    gc.collect()
    assert not any(one() is not None for one in given)
