"""A live run in ComfyUI's own queue: what runs when, what an edit does, how it ends."""

import asyncio

import inprocess
import pytest
from clock import Limit
from inprocess import Client, camera, flat, graph, grey, until, view

pytestmark = pytest.mark.comfy


@pytest.fixture
def running():
    with inprocess.comfy() as both:
        yield both


async def feed(client, frames, value=100, pause=0.02):
    """Camera frames, each once the one before it was seen, as long as the run listens."""
    for i in range(frames):
        if client.closed:
            return
        seen, limit = len(client.views), Limit(0.3)
        await client.send(flat((value + i) % 200))
        await asyncio.sleep(pause)
        # a run that waits in the queue shows none
        while len(client.views) == seen and not client.closed and not limit.over:
            await asyncio.sleep(0.005)


def test_only_what_depends_on_the_camera_runs_per_frame(running):
    comfy, world = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        await feed(client, 30)
        await client.wait(lambda: client.stats.get("frames", 0) >= 25)
        await client.stop()
        return client

    client = inprocess.live(work)
    assert world.calls["TestLoader"] == world.calls["TestEncode"] == 1
    assert world.calls["TestWork"] == client.stats["frames"] >= 25
    states = [s["state"] for s in client.states]
    assert states[-3:] == ["live", "stopping", "ended"]


def test_a_run_without_a_workflow_leaves_the_list_of_jobs_whole(running):
    """As `run.py live --headless` starts one; ComfyUI's page asks for all jobs at once."""
    comfy, _ = running

    async def work(http):
        begun = {**inprocess.begin(graph()), "workflow": None}
        status, answer = await inprocess.post(http, f"{comfy.url}/livediffusion/start", begun)
        assert status == 200
        client = await Client.join(http, comfy.url, answer)
        await feed(client, 3)
        await client.stop()
        refused = {**inprocess.begin(graph()), "workflow": {"id": {"a": 1}}}
        status, _ = await inprocess.post(http, f"{comfy.url}/livediffusion/start", refused)
        assert status == 400
        return answer["prompt_id"]

    entry = comfy.wait_for(inprocess.live(work))
    assert entry["prompt"][3].get("extra_pnginfo", {}).get("workflow", {}) is not None
    jobs = pytest.importorskip("comfy_execution.jobs")
    shown = {**entry, "prompt": entry["prompt"][:5]}
    assert jobs.normalize_history_item(entry["prompt"][1], shown)["id"] == entry["prompt"][1]


def test_a_second_run_finds_the_models_loaded(running):
    comfy, world = running

    async def work(http):
        for _ in range(2):
            client = await Client.start(http, comfy.url, graph())
            await feed(client, 5)
            await client.wait(lambda c=client: len(c.views) >= 2)
            await client.stop()

    inprocess.live(work)
    assert world.calls["TestLoader"] == world.calls["TestEncode"] == 1


def test_an_edit_runs_again_what_depends_on_it(running):
    comfy, world = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        sender = asyncio.create_task(feed(client, 400))
        await client.wait(lambda: len(client.views) >= 5)
        status, answer = await client.post("update", prompt=graph("200"), workflow={"id": "w"})
        assert (status, answer["version"]) == (200, 2)
        await client.wait(lambda: client.views[-1][0].version == 2)
        await client.wait(lambda: client.stats.get("version") == 2)
        await client.stop()
        await sender
        return client

    client = inprocess.live(work)
    assert world.calls["TestLoader"] == 1
    assert world.calls["TestEncode"] == 2
    edited = [packet for packet, _ in client.views if packet.version == 2]
    assert edited and all(abs(grey(p) - 200) <= 1 for p in edited)
    assert all(abs(grey(p) - 200) > 1 for p, _ in client.views if p.version == 1)


def test_an_edit_may_change_the_shape_of_the_graph(running):
    comfy, _world = running
    longer = graph("180")
    longer["6"] = {"class_type": "TestWork", "inputs": {"image": ["4", 0], "cond": ["2", 0]}}
    longer["5"] = view(["6", 0])
    longer["7"] = view(["3", 0])

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        sender = asyncio.create_task(feed(client, 400))
        await client.wait(lambda: len(client.views) >= 3)
        answer = (await client.post("update", prompt=longer, workflow={}))[1]
        assert [v["node"] for v in answer["views"]] == ["5", "7"]
        await client.wait(lambda: {p.view for p, _ in client.views} == {0, 1})
        answer = (await client.post("update", prompt=graph("20"), workflow={}))[1]
        assert [v["index"] for v in answer["views"]] == [0]
        await client.wait(lambda: client.views[-1][0].version == 3)
        await client.stop()
        await sender

    inprocess.live(work)


@pytest.mark.parametrize(
    "broken",
    [
        lambda g: g.pop("5"),
        lambda g: g["2"]["inputs"].pop("text"),
        lambda g: g["4"]["inputs"].update(image=["1", 0]),
        lambda g: g["3"]["inputs"].update(source="file", file="../secret.mp4"),
        lambda g: g["3"]["inputs"].update(source="file", file="nothing.mp4"),
        lambda g: g["3"].update(class_type="Missing"),
    ],
    ids=["no view", "no text", "wrong type", "path", "no file", "unknown class"],
)
def test_an_edit_that_is_refused_changes_nothing(running, broken):
    comfy, _world = running
    bad = graph("200")
    broken(bad)

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        sender = asyncio.create_task(feed(client, 400))
        await client.wait(lambda: len(client.views) >= 3)
        status, answer = await client.post("update", prompt=bad, workflow={})
        seen = len(client.views)
        await client.wait(lambda: len(client.views) >= seen + 5)
        assert client.views[-1][0].version == 1
        await client.stop()
        await sender
        return status, answer

    status, answer = inprocess.live(work)
    assert status == 400
    assert answer["error"]["message"]


def test_an_edit_that_fails_when_run_goes_back(running):
    comfy, world = running
    world.fail = "wrong"

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        sender = asyncio.create_task(feed(client, 600))
        await client.wait(lambda: len(client.views) >= 3)
        await client.post("update", prompt=graph("wrong"), workflow={})
        problem = await client.wait(lambda: client.problems and client.problems[0])
        assert (problem["node"], problem["version"]) == ("4", 2)
        assert "wrong does not work" in problem["reason"]
        seen = len(client.views)
        await client.wait(lambda: len(client.views) >= seen + 5)
        assert client.views[-1][0].version == 1
        await client.post("update", prompt=graph("190"), workflow={})
        await client.wait(lambda: client.views[-1][0].version == 3)
        assert abs(grey(client.views[-1][0]) - 190) <= 1
        await client.stop()
        await sender

    inprocess.live(work)


def test_a_lazy_input_is_made_when_it_is_asked_for(running):
    comfy, world = running

    def switched(which):
        made = graph()
        made["8"] = {"class_type": "TestEncode", "inputs": {"model": ["1", 0], "text": "210"}}
        made["9"] = {"class_type": "TestSwitch", "inputs": {"which": which, "a": ["2", 0],
                     "b": ["8", 0]}}  # fmt: skip
        made["4"]["inputs"]["cond"] = ["9", 0]
        return made

    async def work(http):
        client = await Client.start(http, comfy.url, switched("a"))
        sender = asyncio.create_task(feed(client, 400))
        await client.wait(lambda: len(client.views) >= 3)
        assert world.calls["TestEncode"] == 1
        await client.post("update", prompt=switched("b"), workflow={})
        await client.wait(lambda: client.views[-1][0].version == 2)
        assert abs(grey(client.views[-1][0]) - 210) <= 1
        await client.stop()
        await sender

    inprocess.live(work)
    assert world.calls["TestEncode"] == 2


def test_other_output_nodes_do_not_run_while_live(running):
    comfy, world = running
    both = {**graph(), "6": {"class_type": "TestSave", "inputs": {"image": ["4", 0]}}}

    async def work(http):
        client = await Client.start(http, comfy.url, both)
        assert client.begun["idle"] == [{"node": "6", "type": "TestSave"}]
        await feed(client, 5)
        await client.wait(lambda: len(client.views) >= 3)
        await client.stop()

    inprocess.live(work)
    assert world.calls["TestSave"] == 0


def test_history_has_one_entry_and_the_next_prompt_runs(running):
    comfy, _world = running
    other = {"1": {"class_type": "TestLoader", "inputs": {"name": "other"}}}
    other["2"] = {"class_type": "TestEncode", "inputs": {"model": ["1", 0], "text": "x"}}

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        await feed(client, 10)
        waiting = comfy.put(other, ["2"])
        await feed(client, 10)
        assert waiting not in comfy.prompt_queue.history
        await client.stop()
        return client.begun["prompt_id"], waiting

    live, waiting = inprocess.live(work)
    entry = comfy.wait_for(live)
    assert entry["status"]["status_str"] == "success"
    assert entry["outputs"]["livediffusion-run"]["live"][0]["frames"] >= 10
    assert comfy.wait_for(waiting)["status"]["completed"]
    assert list(comfy.prompt_queue.history) == [live, waiting]
    events = [event for event, data in comfy.messages if data.get("prompt_id") == live]
    assert len(events) < 30  # a handful for the run, none per frame


def test_cancel_ends_a_run(running):
    comfy, _world = running
    from execution import nodes as comfy_nodes

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        sender = asyncio.create_task(feed(client, 400))
        await client.wait(lambda: len(client.views) >= 3)
        comfy_nodes.interrupt_processing()
        await client.wait(lambda: client.closed)
        await sender
        return client

    client = inprocess.live(work)
    assert (client.state, client.states[-1]["reason"]) == ("ended", "Cancelled.")
    entry = comfy.wait_for(client.begun["prompt_id"])
    assert "execution_interrupted" in [event for event, _ in entry["status"]["messages"]]


def test_a_failing_node_is_named_as_comfyui_names_it(running):
    comfy, world = running

    async def work(http, text):
        client = await Client.start(http, comfy.url, graph(text))
        await feed(client, 20)
        return client

    world.fail = "bad"
    client = inprocess.live(lambda http: work(http, "bad"))
    assert (client.state, client.states[-1]["node"]) == ("failed", "4")
    assert "bad does not work" in client.states[-1]["reason"]
    entry = comfy.wait_for(client.begun["prompt_id"])
    failed = next(data for event, data in entry["status"]["messages"] if event == "execution_error")
    assert (failed["node_id"], failed["node_type"]) == ("4", "TestWork")
    assert "bad does not work" in failed["exception_message"]
    sent = [data for event, data in comfy.messages if event == "execution_error"]
    assert [data["node_id"] for data in sent] == ["4"]

    async def again(http):
        client = await Client.start(http, comfy.url, graph("90"))
        await feed(client, 10)
        await client.wait(lambda: len(client.views) >= 3)
        await client.stop()

    inprocess.live(again)


def test_a_failing_loader_is_named_too(running):
    comfy, world = running
    bad = graph()
    bad["1"]["inputs"]["name"] = world.fail = "broken"

    async def work(http):
        reply = await inprocess.post(http, f"{comfy.url}/livediffusion/start",
                                     inprocess.begin(bad))  # fmt: skip
        assert reply[0] == 200, reply
        client = await Client.join(http, comfy.url, reply[1])
        await client.wait(lambda: client.closed)
        return client

    client = inprocess.live(work)
    assert (client.state, client.states[-1]["node"]) == ("failed", "1")
    assert "broken is no model" in client.states[-1]["reason"]


def test_two_runs_take_turns(running):
    comfy, _world = running

    async def work(http):
        first = await Client.start(http, comfy.url, graph("60"), "one")
        feeding = asyncio.create_task(feed(first, 600))
        await first.wait(lambda: len(first.views) >= 3)
        second = await Client.start(http, comfy.url, graph("120"), "two")
        await second.wait(lambda: second.states and second.states[-1]["ahead"] == 1)
        assert second.state == "queued"
        third = await Client.start(http, comfy.url, graph("180"), "three")
        await third.wait(lambda: third.states and third.states[-1]["ahead"] == 2)
        await third.stop()  # taken out of the queue
        assert third.state == "ended"
        await first.stop()
        await feeding
        await feed(second, 20)
        await second.wait(lambda: len(second.views) >= 3)
        await second.stop()
        assert {abs(grey(p) - 60) <= 1 for p, _ in first.views} == {True}
        assert {abs(grey(p) - 120) <= 1 for p, _ in second.views} == {True}
        return third.begun["prompt_id"]

    third = inprocess.live(work)
    assert third not in comfy.prompt_queue.history


def test_the_run_ends_when_its_page_is_gone(running):
    comfy, _world = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        await feed(client, 5)
        await client.wait(lambda: len(client.views) >= 2)
        await client.socket.close()
        limit = Limit(5)
        session = comfy.sessions.get(client.begun["session"])
        await client.wait(lambda: session.over)
        return limit

    limit = inprocess.live(work)
    assert limit.spent > 1.5 and not limit.over
    until(lambda: not comfy.prompt_queue.currently_running)


@pytest.mark.slow
def test_a_page_that_comes_back_in_time_goes_on(running):
    comfy, _world = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        await feed(client, 5)
        await client.socket.close()
        again = await Client.join(http, comfy.url, client.begun)
        again.sequence = 100
        await feed(again, 150)
        assert again.state == "live"
        assert {p.source >= 100 for p, _ in again.views[1:]} == {True}
        await again.stop()

    inprocess.live(work)


def test_the_newest_page_has_the_camera(running):
    """Its connection may be half open: the server does not know yet that nobody is at its end."""
    comfy, _world = running

    async def work(http):
        client = await Client.start(http, comfy.url, graph())
        await feed(client, 5)
        watcher = await Client.join(http, comfy.url, client.begun, "watch")
        again = await Client.join(http, comfy.url, client.begun)
        await client.wait(lambda: client.closed)
        assert client.closed == 4409
        assert "camera to this live run now" in client.refused[0]
        again.sequence = 100
        await feed(again, 10)
        await again.wait(lambda: again.views and again.views[-1][0].source >= 100)
        assert not again.refused
        await watcher.wait(lambda: len(watcher.views) >= 3)
        await watcher.send(flat(7))  # a watcher's frames are not looked at
        await asyncio.sleep(2.5)  # nor does the run end with the page that is gone
        await again.stop()
        assert again.state == "ended" and not watcher.refused
        assert again.states[-1]["reason"] is None

    inprocess.live(work)


def test_what_cannot_run_live_is_refused_in_words(running):
    comfy, _world = running
    still = {"1": {"class_type": "TestSave", "inputs": {"image": ["2", 0]}}, "2": camera()}
    frozen = {**graph(), "5": view(["6", 0])}
    frozen["6"] = {"class_type": "EmptyImage", "inputs": {
        "width": 8, "height": 8, "batch_size": 1, "color": 0}}  # fmt: skip

    async def work(http):
        out = []
        for bad in (still, frozen, {}, [], None, {"1": 5}):
            url = f"{comfy.url}/livediffusion/start"
            out.append(await inprocess.post(http, url, inprocess.begin(bad)))
        return out

    answers = inprocess.live(work)
    assert [status for status, _ in answers] == [400] * len(answers)
    words = [answer["error"]["message"] for _, answer in answers]
    assert "Live View" in words[0]
    assert "Live Camera" in words[1] and answers[1][1]["node_errors"]["5"]["errors"]
    assert "API format" in words[4]
    assert not comfy.prompt_queue.queue


def test_a_page_that_comes_too_late_hears_why(running):
    """The run has failed before its page could listen; stopping it then is no error."""
    comfy, world = running
    world.fail = "a model"
    asked = graph()
    loader = next(n for n, node in asked.items() if node["class_type"] == "TestLoader")
    asked[loader]["inputs"]["name"] = "a model"

    async def work(http):
        url = f"{comfy.url}/livediffusion"
        status, begun = await inprocess.post(http, f"{url}/start", inprocess.begin(asked))
        assert status == 200
        session = comfy.sessions.get(begun["session"])
        await asyncio.to_thread(until, lambda: session.over)
        client = await Client.join(http, comfy.url, begun)
        await client.wait(lambda: client.closed)
        return client, (await client.post("stop"))[0]

    client, stopped = inprocess.live(work)
    (told,) = client.states
    assert told["state"] == "failed" and "is no model" in told["reason"] and client.closed == 4410
    assert stopped == 200


@pytest.mark.slow
def test_the_stats_tell_of_engines(running, tmp_path, monkeypatch):
    """A live graph on a compiled UNet: its choice, what making it took, and no fallback."""
    import folder_paths
    from films import write_gif

    pytest.importorskip("onnxruntime")
    comfy, _ = running
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    write_gif(tmp_path / "film.gif", 12, 40)
    stream = {
        "guider": ["6", 0], "sigmas": ["7", 0], "latent": ["8", 0], "noise_seed": 0,
        "step_rule": "lcm", "frames_per_slot": 1, "mode": "live", "conditioning": "per frame",
        "add_noise": True,
    }  # fmt: skip
    prompt = {"text": "neon night", "clip": ["3", 1]}
    guider = {"model": ["4", 0], "positive": ["5", 0], "cfg": 1.4, "delta": 0.3,
              "mode": "self-negative"}  # fmt: skip
    levels = {"model": ["3", 0], "steps": 2, "strength": 0.5, "spacing": "uniform t"}
    graph = {
        "1": inprocess.camera(source="file", file="film.gif", width=64, height=64),
        "2": inprocess.view(["10", 0]),
        "3": {"class_type": "LiveDemoModel", "inputs": {}},
        "4": {"class_type": "LiveCompile", "inputs": {"model": ["3", 0], "engine": "onnxruntime"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": prompt},
        "6": {"class_type": "LiveRCFGGuider", "inputs": guider},
        "7": {"class_type": "LiveStrength", "inputs": levels},
        "8": {"class_type": "LiveEncode", "inputs": {"pixels": ["1", 0], "vae": ["3", 2]}},
        "9": {"class_type": "LiveStreamSampler", "inputs": stream},
        "10": {"class_type": "LiveDecode", "inputs": {"samples": ["9", 0], "vae": ["3", 2]}},
    }

    async def work(http):
        client = await Client.start(http, comfy.url, graph)
        await client.wait(lambda: len(client.views) >= 8, 60)
        await client.wait(lambda: client.stats.get("engines"), 20)
        await client.stop()
        return client.stats

    stats = inprocess.live(work)
    assert stats["roads"] == [{"road": "direct", "why": ""}]
    (told,) = stats["engines"]
    assert told["engine"] == "onnxruntime" and told["why"] == "chosen"
    assert told["fallbacks"] == 0 and told["calls"] >= 8
    assert told["made"][0]["seconds"]["export"] > 0
