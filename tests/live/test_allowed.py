"""Who may allow what, and where secrets of addresses go: nowhere but to who connects."""

import json
import os
import pathlib
import re
import time

import aiohttp
import inprocess
import pytest
from inprocess import camera, graph, until, view
from livediffusion.live import wires
from livediffusion.live.concealed import Concealed
from livediffusion.trust.addresses import parsed
from livediffusion.trust.boundary import at_server
from rtsp_server import RtspServer

pytestmark = pytest.mark.comfy
WORD, KEY, TOKEN = "sup3rs3cr3t", "str3amk3y", "t0k3nt0k3nt0k3n"


@pytest.fixture
def running(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    with inprocess.comfy() as both:
        yield both


HERE = {"Host": "127.0.0.1:8188"}
FAR = [
    ({"Host": "192.168.1.5:8188"}, "127.0.0.1"),
    ({"Host": "comfy.example"}, "127.0.0.1"),  # a name that leads here
    ({"Host": "localhost.evil.example"}, "127.0.0.1"),
    (HERE, "192.168.1.7"), (HERE, None), ({}, "127.0.0.1"),
    (HERE | {"X-Forwarded-For": "1.2.3.4"}, "127.0.0.1"),
    (HERE | {"x-forwarded-host": "a"}, "127.0.0.1"), (HERE | {"Forwarded": "for=x"}, "127.0.0.1"),
    (HERE | {"X-Real-IP": "1.2.3.4"}, "127.0.0.1"), (HERE | {"via": "1.1 proxy"}, "127.0.0.1"),
    (HERE | {"CF-Connecting-IP": "1.2.3.4"}, "127.0.0.1"),
    (HERE | {"Origin": "http://evil.example"}, "127.0.0.1"),
    (HERE | {"Origin": "null"}, "127.0.0.1"),
    (HERE | {"Sec-Fetch-Site": "cross-site"}, "127.0.0.1"),
]  # fmt: skip


@pytest.mark.parametrize("headers, peer", FAR)
def test_who_does_not_sit_at_the_server_is_told_apart(headers, peer):
    assert not at_server(headers, peer)


@pytest.mark.parametrize("headers, peer", [
    (HERE, "127.0.0.1"), ({"Host": "localhost:8188"}, "::1"), ({"Host": "[::1]:8188"}, "::1"),
    (HERE, "::ffff:127.0.0.1"), (HERE | {"Origin": "http://127.0.0.1:8188"}, "127.0.0.1"),
])  # fmt: skip
def test_who_sits_at_the_server_is_known(headers, peer):
    assert at_server(headers, peer)


@pytest.mark.parametrize("page", ["live", "serve"])
def test_a_proxy_as_the_docs_have_it_is_not_the_server(page):
    """Whatever a program elsewhere says of Host to it."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"location / \{(.*?)\}", text, re.S)
    said = {"$http_host": "localhost:8188", "$host": "localhost", "$remote_addr": "192.168.1.7"}
    headers = {name: said.get(value, "") for name, value in
               re.findall(r"proxy_set_header (\S+) (\S+);", block)}  # fmt: skip
    assert headers["Host"].startswith("localhost")
    assert not at_server(headers, "127.0.0.1")


def address(port, login=f"me:{WORD}@"):
    return f"rtsp://{login}127.0.0.1:{port}/film?auth={TOKEN}"


def through(source, target="rtmp://127.0.0.1:9/app/" + KEY):
    """An address -> work -> a view, and a Live Send that sends to another."""
    made = graph(source="address", address=source, width=96, height=96)
    send = {"to": "stream", "name": "", "address": target, "fps": 30, "bit_rate": 6.0}
    made["6"] = {"class_type": "LiveSend", "inputs": {"image": ["4", 0], **send}}
    return made


def workflow(made):
    """The same as the page keeps it, one of them in a subgraph, and a note that says it, too."""
    texts = {n: list(node["inputs"].values()) for n, node in made.items()}
    nodes = [
        {"id": int(n), "type": node["class_type"], "widgets_values": texts[n]}
        for n, node in made.items()
    ]
    sleeping = {"id": 9, "type": "LiveCamera", "widgets_values": ["address", f"rtsp://a:{WORD}@b/"]}
    inside = {"definitions": {"subgraphs": [{"nodes": [nodes[2], sleeping]}]}}
    note = {"id": 10, "type": "Note", "widgets_values": [f"see {made['3']['inputs']['address']} !"]}
    return {"id": "w", "nodes": [*nodes, note], **inside}


def walked(value, where=""):
    """Every text that can be reached from something."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    for secret in (WORD, KEY, TOKEN):
        assert secret not in text, (where, text[max(0, text.find(secret) - 200) :][:400])


async def post(http, comfy, route, **data):
    return await inprocess.post(http, f"{comfy.url}/livediffusion/{route}", data)


def test_no_secret_is_in_anything_that_others_see(running, tmp_path, caplog, capfd):
    """A start that is refused, one that runs, edits, problems, stats, history, the log."""
    comfy, _ = running
    server = RtspServer()  # it has no film, which is a trouble to tell
    answers = []

    async def work(http):
        made = through(address(server.port))
        begun = inprocess.begin(made)
        begun["workflow"] = workflow(made)
        refused = await post(http, comfy, "start", **begun)
        assert refused[0] == 400
        # what the page finds at the node, and sends back to allow it
        for node in ("3", "6"):
            _, answer = await post(http, comfy, "start", **begun)
            answers.append(answer)
            allow = answer["node_errors"][node]["errors"][0]["extra_info"]["allow"]
            assert allow["kind"] == "address" and "{k" in allow["what"]
            status, answer = await post(http, comfy, "allow", **allow)
            assert status == 200 and "{k" in answer["address"], answer
            answers.append(answer)
        client = await inprocess.Client.start(http, comfy.url, made)
        await client.wait(lambda: client.problems and client.stats.get("sources"))
        answers.append(await client.post("update", **begun))
        await client.wait(lambda: "name" in str(client.problems))
        async with aiohttp.ClientSession() as other:
            place = f"session={client.begun['session']}&token={client.begun['token']}"
            async with other.get(f"{comfy.url}/livediffusion/stats?{place}") as reply:
                answers.append(await reply.text())
        await client.stop()
        return client

    client = inprocess.live(work)
    server.close()
    history = until(lambda: comfy.prompt_queue.get_history())
    walked([answers, client.states, client.stats, client.problems, client.begun], "messages")
    walked(history, "history")
    walked(comfy.messages, "events")
    walked(caplog.text, "log")
    walked("".join(capfd.readouterr()), "output")
    walked((tmp_path / "livediffusion" / "allowed.json").read_text(encoding="utf-8"), "patterns")
    session = next(iter(comfy.sessions._all.values()), None)
    if session is not None:
        walked(repr(session.shared.extra) + repr(session.split), "run")
    # it was there all the time: the server was asked for it
    assert any(TOKEN in line for line in server.heard)


def test_an_ordinary_prompt_and_its_workflow_lose_their_secrets_too(running):
    comfy, _ = running
    made = through(address(5))
    made["3"]["inputs"]["address"] = ["8", 0]
    made["8"] = {"class_type": "PrimitiveString", "inputs": {"value": address(5)}}
    flow = workflow(through(address(5)))
    data = {"prompt": made, "extra_data": {"extra_pnginfo": {"workflow": flow}}}
    after = comfy.trigger_on_prompt(data)
    walked(after)
    assert "{k" in after["prompt"]["8"]["inputs"]["value"]
    # the same one has the same name
    again = comfy.trigger_on_prompt({"prompt": through(address(5)), "extra_data": {}})
    assert again["prompt"]["3"]["inputs"]["address"] == after["prompt"]["8"]["inputs"]["value"]


@pytest.mark.parametrize("odd", [
    None, [], {"prompt": None}, {"prompt": {"1": None, "2": {"class_type": []}}},
    {"prompt": {"1": {"class_type": "LiveCamera", "inputs": None}}},
    {"prompt": {"1": {"class_type": "LiveCamera", "inputs": {"address": ["1", 0]}}}},
    {"prompt": {"1": {"class_type": "LiveCamera", "inputs": {"address": [{}, 0]}}}},
    {"prompt": {}, "extra_data": {"extra_pnginfo": {"workflow": [{"type": "LiveCamera"}]}}},
])  # fmt: skip
def test_a_prompt_that_is_none_passes_unharmed(running, odd):
    comfy, _ = running
    if not isinstance(odd, dict):
        odd = {"prompt": odd}
    before = json.dumps(odd)
    assert json.dumps(comfy.trigger_on_prompt(odd)) == before


@pytest.mark.parametrize("text", [
    f"rtsp://me:{WORD}@cam/x y", f"rtsp://me:p@{WORD}/@cam/", f"rtsp://me:{WORD}#@cam/x",
    f"http://cam/?pass={WORD}&x=\u00fc", f"rtsp://{WORD}:{WORD}@@cam",
    f"rtsp://me:12?{WORD}@cam/",
])  # fmt: skip
def test_what_is_no_address_shows_nothing_either(running, text):
    assert WORD not in wires.concealed().conceal(text)
    with pytest.raises(ValueError, match=r"^address: ") as refused:
        wires.checked(text, ("rtsp", "http"))
    assert WORD not in str(refused.value)


def test_only_who_sits_at_the_server_may_allow(running):
    comfy, _ = running

    async def work(http):
        for headers in ({"Host": "far.example"}, {"X-Forwarded-For": "10.0.0.9"},
                        {"Origin": "http://evil.example"}):  # fmt: skip
            url, what = f"{comfy.url}/livediffusion/allow", {"kind": "device", "what": "Cam"}
            status, told = await inprocess.post(http, url, what, headers=headers)
            assert status == 403 and told["error"]["message"]
        for data in ({"kind": "file", "what": "x"}, {"kind": "address", "what": "file:///x"},
                     {"kind": "address", "what": "http://169.254.169.254/"},
                     {"kind": "address", "what": "http://*/"}, {"kind": "device", "what": "*"},
                     {"kind": "device", "what": "a\nb"},
                     {"kind": "device", "what": ""}):  # fmt: skip
            status, told = await post(http, comfy, "allow", **data)
            assert status == 400 and told["error"]["message"], data
        assert not wires.allowed().path.exists()
        assert (await post(http, comfy, "allow", kind="device", what="Cam"))[0] == 200

    inprocess.live(work)
    wires.allowed().device("Cam")


def test_a_secret_is_known_tomorrow_once_it_is_allowed_and_only_to_its_server(tmp_path):
    store = Concealed(tmp_path)
    text = store.conceal(f"rtsp://me:{WORD}@10.0.0.5/film")
    shown = parsed(text)
    assert store.reveal(shown).login == f"me:{WORD}"
    with pytest.raises(ValueError, match="is not known"):
        Concealed(tmp_path).reveal(shown)
    store.keep(shown)
    path = tmp_path / "livediffusion" / "secrets.json"
    assert WORD in path.read_text(encoding="utf-8")
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o600
    tomorrow = Concealed(tmp_path)
    assert tomorrow.reveal(shown).login == f"me:{WORD}"
    assert tomorrow.conceal(f"rtsp://me:{WORD}@10.0.0.5/film") == text
    for other in ("rtsp://{}@10.0.0.6/film", "http://{}@10.0.0.5/film", "rtsp://{}@10.0.0.5:1/"):
        with pytest.raises(ValueError, match="is not known"):
            tomorrow.reveal(parsed(other.format(shown.login)))


def test_a_thousand_secrets_are_bounded_and_those_in_use_stay(tmp_path):
    store = Concealed(tmp_path)
    used = parsed(store.conceal("rtsp://a:first@host/"))
    begun = time.monotonic()
    for i in range(1000):
        store.conceal(f"rtsp://a:{i}@host/")
        store.conceal(used.text())
    assert store.reveal(used).login == "a:first" and len(store._known) <= 256
    assert time.monotonic() - begun < 30


def test_a_device_or_address_that_a_visitor_names_is_not_opened(running):
    """Whoever starts a run: what the person at the server did not allow is refused at its start."""
    comfy, _ = running

    async def work(http):
        for settings in ({"source": "device", "device": "Cam"},
                         {"source": "address", "address": "rtsp://10.0.0.5/x"}):  # fmt: skip
            made = {**graph(), "3": camera(**settings), "5": view(["3", 0])}
            status, answer = await post(http, comfy, "start", **inprocess.begin(made))
            assert status == 400 and "not allowed yet" in str(answer)

    inprocess.live(work)
