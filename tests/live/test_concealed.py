"""What is secret in an address, in every spelling that people have for it, is seen by nobody."""

import errno
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import inprocess
import pytest
from inprocess import camera, graph, view
from livediffusion.live import wires
from livediffusion.live.concealed import UNREAD, Concealed
from livediffusion.live.faults import Refused
from livediffusion.trust.addresses import SCHEMES, parsed

pytestmark = pytest.mark.comfy
WORD = "SEKRET9"
ANY = tuple(SCHEMES)


@pytest.fixture
def running(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    with inprocess.comfy() as both:
        yield both


def allow(*patterns):
    for pattern in patterns:
        wires.allowed().add("address", pattern)


LOGINS = [f"{WORD}@", f"me:{WORD}@", f":{WORD}@", f"{WORD}:{WORD}@", f"me:%40{WORD}%2F@",
          f"me:{WORD}:1@", f"me:{{{WORD}}}@"]  # fmt: skip
TAILS = ["", "/", "/live/1", "/a%20b/", "?channel=1"]
SECRETS = [
    f"?user=admin&pwd={WORD}", f"/x?channel=1&token={WORD}", f"?{WORD}", f"/?p%61ss={WORD}",
    f"?a=1;pass={WORD}", f"?pass%3D{WORD}", f"?PASSWORD={WORD}&",
    f"/user=admin&password={WORD}&channel=1&stream=0.sdp", f"/pw={WORD}", f"/a/token={WORD}/b",
    f"/user=admin_password={WORD}_channel=1_stream=0.sdp?real_stream",
    f"/user=admin;pwd={WORD};channel=2/", f"/user%3Dadmin%26password%3D{WORD}%26channel%3D1",
]  # fmt: skip
KEYS = [f"/live/{WORD}", f"/live/{WORD}/", f"/{WORD}", f"/{WORD}//", f"/app/one/{WORD}?a=1"]
WHIP = [f"/whip/{WORD}", f"/{WORD}/whip", f"/{WORD}/", f"/api/v1/{WORD}/endpoint/"]


def spellings():
    """Addresses with a secret, and whether pictures go there."""
    blanks = itertools.cycle([("", ""), (" ", ""), ("", "\n"), ("\t \u00a0", "  "), ("\x1f", "")])
    written = itertools.cycle([str.lower, str.upper, str.title])
    hosts = itertools.cycle(["10.0.0.5:8554", "CAM.local:90", "[fd00::5]:8554", "cam.local.:1"])
    for scheme in ANY:
        secret = [f"{login}{{}}{tail}" for login in LOGINS for tail in TAILS]
        secret += [f"{{}}{tail}" for tail in SECRETS]
        both = [(one, sink) for one in secret for sink in (False, True)]
        if scheme in ("rtmp", "rtmps", "rtsp", "rtsps"):
            both += [("{}" + key, True) for key in KEYS]
        if scheme in ("http", "https"):
            both += [("{}" + key, True) for key in KEYS + WHIP]
        for one, sink in both:
            before, behind = next(blanks)
            name = next(written)(scheme)
            # a name in braces must not be taken for a place that is filled in
            text = one.replace("{}", next(hosts), 1)
            yield f"{before}{name}://{text}{behind}", sink


def test_every_spelling_is_concealed_and_reveals_to_the_same_address(running, tmp_path):
    allow(*(f"{scheme}://*:*" for scheme in ANY), *(f"{s}://[::/0]:*" for s in ANY))
    count = 0
    for text, sink in spellings():
        shown = wires.concealed().conceal(text, sink)
        assert WORD not in shown, (text, shown)
        assert wires.concealed().conceal(shown, sink) == shown, text
        meant = parsed(text.strip())
        for spelt in (text, shown):
            assert wires.checked(spelt, ANY, sink=sink) == meant, (text, shown)
        # what was concealed as a source's is opened as a sink's, too
        other = wires.concealed().conceal(text, not sink)
        assert wires.checked(other, ANY, sink=sink) == meant, (text, other)
        count += 1
    assert count > 600


WRONG = [
    f"http:/me:{WORD}@10.0.0.5/x", f"me:{WORD}@10.0.0.5/x", f"rtsp:me:{WORD}@cam",
    f"rtsp//me:{WORD}@cam/", f"rtsp://me:{WORD}@x@10.0.0.5/", f"rtsp://me:a {WORD}@10.0.0.5/",
    f"rtsp://me:x@{WORD}@cam/", f"http://cam/?pass=x@{WORD}", f"rtsp://me:{WORD}#@cam",
    f"cam.local/?token={WORD}", f"rtsp://me:{WORD}", f"ftp://me:{WORD}@cam/",
    f"rtsp://me:{WORD}%40cam/", f"rtsp://me:{WORD}\uff20cam/", f"rtsp://cam/../?a={WORD}",
    f"password={WORD}", f"srt://cam?passphrase={WORD}",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_written_wrongly_is_concealed_and_refused_in_words(running, text):
    shown = wires.concealed().conceal(f" {text}")
    assert WORD not in shown and UNREAD in shown
    for spelt in (text, shown):
        with pytest.raises(ValueError, match=r"^address: ") as refused:
            wires.checked(spelt, ANY)
        said = str(refused.value)
        assert WORD not in said and "not known" not in said, said
    assert "in a password @ is written %40" in said


@pytest.mark.parametrize("text", [f"rtmp:/host/live/{WORD}", f"host/live/{WORD}/",
                                  f"rtmp://host/live/{WORD} x"])  # fmt: skip
def test_a_key_in_what_is_no_address_is_concealed_for_a_sink(tmp_path, text):
    store = Concealed(tmp_path)
    assert WORD not in store.conceal(text, sink=True)
    assert WORD in store.conceal(text)  # for a source it is a path like any other


def test_the_words_for_a_login_that_is_written_wrongly(running):
    for text in ("rtsp://u:pw@x@10.0.0.5/", "rtsp://u:p w@10.0.0.5/"):
        with pytest.raises(ValueError, match="in a password @ is written %40"):
            wires.checked(text, ANY)
    with pytest.raises(ValueError, match="It begins with one of rtsp://") as refused:
        wires.checked("Maria:pw@10.0.0.5/x", ANY)
    assert "maria" not in str(refused.value).lower()


@pytest.mark.parametrize("text", [
    "rtsp://cam.local/stream", " http://10.0.0.5/video?channel=1&stream=main ", "HTTP://Cam/x",
    "", "cam.local", "srt://cam:9000?mode=caller",
])  # fmt: skip
def test_what_has_no_secret_stays_as_it_is(tmp_path, text):
    assert Concealed(tmp_path).conceal(text) == text


def test_short_and_plain_values_of_secret_names_are_concealed(tmp_path):
    store = Concealed(tmp_path)
    for name in ("pwd", "Pass", "user", "token", "api_key", "secret", "auth", "login", "sig"):
        shown = store.conceal(f"http://cam/?{name}=12345&channel=1")
        assert "12345" not in shown and "channel=1" in shown
        assert store.reveal(parsed(shown)).query == f"{name}=12345&channel=1"


def unreadable(path, how, monkeypatch):
    """Make a file of secrets one that cannot be read; returns what mends it."""
    whole = path.read_bytes()
    if how == "moment":
        with monkeypatch.context() as patched:

            def full(path, most):
                raise OSError(errno.EMFILE, "Too many open files")

            patched.setattr(sys.modules[Concealed.__module__], "contents", full)
            yield
    else:
        damaged = {
            "comma": whole[:-1] + b",}", "empty": b"", "cut": whole[:-9], "foreign": b'{"k1": "x"}',
            "large": whole + b" " * 2**20,
        }  # fmt: skip
        path.write_bytes(damaged[how])
        yield
        assert path.read_bytes() == damaged[how]
        path.write_bytes(whole)
    yield


@pytest.mark.parametrize("how", ["moment", "comma", "empty", "cut", "foreign", "large"])
def test_secrets_that_cannot_be_read_now_are_not_lost(tmp_path, monkeypatch, how):
    """Nothing is written over them, and they are there again once they can be."""
    first, second = (f"rtsp://me:{WORD}{i}@10.0.0.{i}/" for i in (1, 2))
    before = Concealed(tmp_path)
    known = before.read(first)
    before.keep(known)
    store = Concealed(tmp_path)
    steps = unreadable(store.path, how, monkeypatch)
    next(steps)
    new = store.read(second)
    with pytest.raises(OSError, match=r"secrets\.json cannot be read \(.*Mend it") as failed:
        store.keep(new)
    assert WORD not in str(failed.value) and not store.saved(new.text())
    # what is typed is known all the same, and what has no secret needs no file
    assert store.reveal(new) == parsed(second)
    store.keep(parsed("rtsp://10.0.0.3/"))
    with pytest.raises(Refused, match=r"stands for a secret; .*secrets\.json cannot be read"):
        store.reveal(known)
    next(steps)
    assert store.reveal(known) == parsed(first)
    store.keep(new)
    tomorrow = Concealed(tmp_path)
    assert [tomorrow.reveal(one) for one in (known, new)] == [parsed(first), parsed(second)]


def test_allow_says_that_secrets_cannot_be_read(running):
    comfy, _ = running
    path = wires.concealed().path
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    asked = {"kind": "address", "what": f"rtsp://me:{WORD}@10.0.0.5/"}

    async def work(http):
        return await inprocess.post(http, f"{comfy.url}/livediffusion/allow", asked)

    status, answer = inprocess.live(work)
    said = answer["error"]["message"]
    assert status == 400 and said.startswith("address: ") and "secrets.json cannot be read" in said
    assert path.read_text(encoding="utf-8") == "{" and not wires.allowed().path.exists()


def test_an_ordinary_prompt_shows_no_secret_in_whichever_way_it_is_given(running):
    comfy, _ = running
    for text in [f" http://me:{WORD}@host/", *WRONG]:
        made = graph(source="address", address=text, width=96, height=96)
        flow = {"nodes": [{"id": 3, "type": "LiveCamera", "widgets_values": ["address", text]},
                          {"id": 9, "type": "LiveSend", "widgets_values": ["stream", text]},
                          {"id": 10, "type": "Note", "widgets_values": [text]}]}  # fmt: skip
        data = {"prompt": made, "extra_data": {"extra_pnginfo": {"workflow": flow}}}
        assert WORD not in repr(comfy.trigger_on_prompt(data)), text


def test_an_address_put_together_by_nodes_loses_its_secret_where_it_is_seen(running):
    comfy, _ = running
    made = graph(source="address", address=["7", 0])
    made["7"] = {"class_type": "StringConcatenate",
                 "inputs": {"string_a": ["8", 0], "string_b": "10.0.0.5/x", "delimiter": ""}}
    made["8"] = {"class_type": "PrimitiveString", "inputs": {"value": f"rtsp://me:{WORD}@"}}
    after = comfy.trigger_on_prompt({"prompt": made, "extra_data": {}})["prompt"]
    assert WORD not in repr(after)
    assert after["7"]["inputs"]["string_b"] == "10.0.0.5/x"


def test_texts_of_other_nodes_stay_as_they_are(running):
    comfy, _ = running
    made = graph(source="address", address="@home")
    made["3"]["inputs"]["file"] = "clip@2x=1.mp4"
    made["9"] = {"class_type": "CLIPTextEncode", "inputs": {"text": "me@home, a key=c"}}
    before = json.dumps({n: v for n, v in made.items() if n != "3"})
    flow = {"nodes": [{"type": "LiveCamera", "widgets_values": ["clip@2x=1.mp4", "Cam@1"]}]}
    data = {"prompt": made, "extra_data": {"extra_pnginfo": {"workflow": flow}}}
    after = comfy.trigger_on_prompt(data)
    assert after["prompt"]["3"]["inputs"]["file"] == "clip@2x=1.mp4"
    assert json.dumps({n: v for n, v in after["prompt"].items() if n != "3"}) == before
    assert flow["nodes"][0]["widgets_values"] == ["clip@2x=1.mp4", "Cam@1"]


def test_start_and_update_tell_the_page_what_its_nodes_are_to_have(running):
    """Only where it differs, and only what is still known tomorrow."""
    comfy, _ = running
    allow("rtsp://127.0.0.1:9/*")
    text = f"rtsp://me:{WORD}@127.0.0.1:9/x"

    async def work(http):
        made = {**graph(), "3": camera(source="address", address=f" {text}"), "5": view(["3", 0])}
        # one that is not opened, and so not kept
        made["8"] = camera(source="browser", address=f"rtsp://a:{WORD}@10.0.0.9/")
        made["9"] = view(["8", 0])
        client = await inprocess.Client.start(http, comfy.url, made)
        told = client.begun["concealed"]
        assert list(told) == ["3"] and list(told["3"]) == ["address"] and WORD not in str(told)
        made["3"]["inputs"]["address"] = told["3"]["address"]
        again = inprocess.begin(made)
        assert (await client.post("update", **again))[1]["concealed"] == {}
        made["3"]["inputs"]["address"] = text
        again = inprocess.begin(made)
        assert (await client.post("update", **again))[1]["concealed"] == told
        await client.stop()
        return told["3"]["address"]

    shown = inprocess.live(work)
    tomorrow = Concealed(pathlib.Path(wires.concealed().path).parents[1])
    assert tomorrow.reveal(parsed(shown)) == parsed(text)


def test_the_page_puts_it_into_widgets_that_still_have_what_was_sent():
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js to run the page's module")
    module = pathlib.Path(__file__).parents[2] / "web" / "live" / "concealed.mjs"
    script = """
      const { conceal } = await import(process.argv[1])
      const one = (value) => ({ widgets: [{ name: 'fps', value: 3 }, { name: 'address', value }] })
      const nodes = { 1: one('typed'), 2: one('typed since'), 3: one('hidden') }
      const sent = { 1: { inputs: { address: 'typed' } }, 2: { inputs: { address: 'typed' } },
        3: { inputs: { address: 'typed' } } }
      const concealed = {}
      for (const id of [1, 2, 3, 4]) concealed[id] = { address: 'hidden', other: 'x' }
      const count = conceal(concealed, sent, (id) => nodes[id])
      const values = Object.values(nodes).map(({ widgets }) => widgets[1].value)
      console.log(JSON.stringify([count, values, conceal(undefined, {}, () => null)]))
    """
    call = [node, "--input-type=module", "-e", script, module.as_uri()]
    told = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(told) == [1, ["hidden", "typed since", "hidden"], 0]
