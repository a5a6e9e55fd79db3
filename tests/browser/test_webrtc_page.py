"""The page by WebRTC: the camera goes up as a track, views come down as tracks; and Chromium at
WHIP and WHEP by itself."""

import importlib.util
import itertools
import pathlib

import numpy as np
import pytest
from clock import Limit

pytest.importorskip("aiortc", reason="aiortc is not installed")
pytestmark = [pytest.mark.comfy, pytest.mark.server]

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("browser_tools", HERE / "conftest.py")
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)
through, read_counter = tools.through, tools.read_counter

SET = "window.app.extensionManager.setting.set('livediffusion.transport', a)"
LINE = "document.querySelector('.livediffusion-figures').textContent"


@pytest.fixture
def tracked(page):
    """The page with WebRTC chosen."""
    page.get(SET, "WebRTC")
    yield page
    page.stop()
    page.get(SET, "WebSocket")


def numbers(drawn):
    return [read_counter(np.array(d["greys"]).reshape(96, 96)) for d in drawn]


def test_pictures_come_by_tracks_in_order_and_by_the_socket_while_they_are_compared(tracked):
    page = tracked
    page.load(through())
    page.live()
    page.wait(f"{LINE}.includes('round trip')", 30)
    page.get("window.live.watch()")
    page.wait("window.live.drawn.length >= 40", 60)
    drawn = page.get("window.live.drawn")
    page.wait(f"/[1-9].* Mbit.s in, .*[1-9].* out, [0-9]+ ms/.test({LINE})")
    read = [n for n in numbers(drawn) if n is not None]
    assert len(read) >= 0.95 * len(drawn)
    # a picture that comes again is finer; the camera's file starts again
    steps = [(b - a) % tools.LAP for a, b in itertools.pairwise(read)]
    assert all(0 <= step < 200 for step in steps), read
    assert sum(step > 0 for step in steps) > 0.8 * len(steps)
    sources = [int(d["source"]) for d in drawn]
    assert sources == sorted(sources) and sources[0] < sources[-1]
    # each with the frame that it was made from, which no track carries
    page.page.click("button[data-mode='side by side']")
    page.wait("document.querySelector('.livediffusion-compare').dataset.compare === 'side by side'")
    page.wait(f"!{LINE}.includes('round trip')")
    page.page.click("button[data-mode='off']")
    page.wait(f"{LINE}.includes('round trip')", 30)
    # an edit goes on as ever
    page.get("((w) => { w.value = 128; w.callback?.(128) })"
             "(app.graph.getNodeById(1).widgets.find(({ name }) => name === 'width'))")  # fmt: skip
    page.wait("Number(window.live.views()[0].dataset.version) >= 2")
    page.wait("window.live.views()[0].width === 128")
    page.stop()
    assert page.get("window.live.cameras()") == 0
    assert not page.ours


def test_what_does_not_work_by_tracks_goes_by_the_socket(tracked):
    """A network that lets no UDP through, as a proxy's: no connection comes about."""
    page = tracked
    page.load(through())
    page.get("""(() => { const { prototype } = RTCPeerConnection
        window.live.real = prototype.setRemoteDescription
        prototype.setRemoteDescription = () => Promise.reject(new Error('no')) })()""")
    try:
        page.live()
        page.wait("Number(window.live.views()[0].dataset.frames) > 10")
        assert "round trip" not in page.get(LINE)
        page.stop()
    finally:
        page.get("RTCPeerConnection.prototype.setRemoteDescription = window.live.real")
    assert not page.ours


def test_a_track_that_stands_or_is_closed_gives_way_to_the_socket(tracked):
    page = tracked
    page.load(through())
    page.get("""(() => {
        window.live.Real = MediaStreamTrackProcessor
        window.MediaStreamTrackProcessor = class extends window.live.Real {
          get readable() {
            const reader = super.readable.getReader(), never = new Promise(() => {})
            return { getReader: () => ({ read: () => window.live.stands ? never : reader.read() }) }
          }
        }
        const fetch = window.live.fetch = window.fetch
        window.live.held = []
        window.fetch = async (...what) => {
          const reply = await fetch(...what), there = reply.headers.get('Location')
          if (there?.includes('/rtc/')) window.live.held.push(there)
          return reply
        } })()""")
    on = "Number(window.live.views()[0].dataset.frames)"
    try:
        page.live()
        page.wait(f"{LINE}.includes('round trip')", 30)
        # up, and nothing comes: as when what sends has broken
        page.get("window.live.stands = true")
        page.wait(f"!{LINE}.includes('round trip')", 15)
        seen = page.get(on)
        page.wait(f"{on} > {seen + 10}")
        page.stop()
        page.get("(window.MediaStreamTrackProcessor = window.live.Real, window.live.held = [], 0)")
        page.live()
        page.wait(f"{LINE}.includes('round trip')", 30)
        assert page.get("window.live.held.length") == 2  # the camera's and the view's
        page.get("Promise.all(window.live.held.map((url) => fetch(url, { method: 'DELETE' })))")
        # long before the way to it is found to be gone
        page.wait(f"!{LINE}.includes('round trip')", 10)
        seen = page.get(on)
        page.wait(f"{on} > {seen + 10}")
        page.stop()
    finally:
        page.get("""(() => { window.MediaStreamTrackProcessor = window.live.Real
            window.fetch = window.live.fetch })()""")
    assert not page.ours


CLIENT = """
window.live.offer = async (link, url) => {
  await link.setLocalDescription(await link.createOffer());
  await new Promise((done) => { link.iceGatheringState === 'complete' ? done()
    : link.onicegatheringstatechange = () => link.iceGatheringState === 'complete' && done() });
  const headers = { 'Content-Type': 'application/sdp' };
  const reply = await fetch(url, { method: 'POST', headers, body: link.localDescription.sdp });
  if (reply.status !== 201) return reply.status;
  await link.setRemoteDescription({ type: 'answer', sdp: await reply.text() });
  window.live.place = reply.headers.get('Location');
  return reply.status;
};
window.live.publish = async (url) => {
  const shown = document.createElement('canvas');
  Object.assign(shown, { width: 192, height: 192 });
  const brush = shown.getContext('2d');
  window.live.count = 0;
  window.live.paint = setInterval(() => {
    const number = ++window.live.count;
    for (let bit = 0; bit < 12; bit++) {
      brush.fillStyle = number >> bit & 1 ? '#ebebeb' : '#101010';
      brush.fillRect(16 * bit, 0, 16, 192);
    }
  }, 50);
  const link = window.live.up = new RTCPeerConnection();
  link.addTransceiver(shown.captureStream().getVideoTracks()[0], { direction: 'sendonly' });
  link.addTransceiver('audio', { direction: 'sendonly' });
  return window.live.offer(link, url);
};
window.live.play = async (url) => {
  const link = window.live.down = new RTCPeerConnection();
  const video = window.live.video = document.createElement('video');
  link.ontrack = ({ track }) => Object.assign(video,
    { muted: true, srcObject: new MediaStream([track]) }).play();
  link.addTransceiver('video', { direction: 'recvonly' });
  return window.live.offer(link, url);
};
"""


GRAPH = {
    "1": {"class_type": "LiveCamera", "inputs": {
        "source": "whip", "file": "none", "width": 192, "height": 192, "fit": "crop", "fps": 30,
        "mirror": False, "loop": True}},
    "2": {"class_type": "LiveView", "inputs": {
        "image": ["1", 0], "quality": 90, "record": False, "filename_prefix": "live/x"}},
}  # fmt: skip
RUN = """async (graph) => {
  const body = JSON.stringify({ client_id: 'elsewhere', prompt: graph });
  const headers = { 'Content-Type': 'application/json' };
  const reply = await fetch('/livediffusion/start', { method: 'POST', headers, body });
  const begun = window.live.run = await reply.json();
  const { session, token } = begun;
  const query = new URLSearchParams({ session, token, role: 'owner' });
  window.live.socket = new WebSocket(`ws://${location.host}/livediffusion/frames?${query}`);
  return [begun.cameras[0].whip.url, begun.views[0].whep];
}"""
LOOKED = """(() => {
  const { video, count } = window.live;
  if (!video?.videoWidth) return null;
  const small = new OffscreenCanvas(video.videoWidth, video.videoHeight).getContext('2d');
  small.drawImage(video, 0, 0);
  let number = 0;
  for (let bit = 0; bit < 12; bit++) {
    const [r] = small.getImageData((bit + 0.5) * video.videoWidth / 12, 96, 1, 1).data;
    number |= (r > 128) << bit;
  }
  return [number, count];
})()"""


def test_chromium_publishes_by_whip_and_plays_by_whep(page):
    """By the standards alone, as a program elsewhere: with sound, which is declined."""
    page.get(f"(() => {{ {CLIENT} }})()")
    whip, whep = page.page.evaluate(RUN, GRAPH)
    try:
        assert page.page.evaluate("(url) => window.live.publish(url)", whip) == 201
        page.wait("window.live.up.connectionState === 'connected'")
        limit = Limit(20)
        while page.page.evaluate("(url) => window.live.play(url)", whep) != 201:
            assert not limit.over  # not live yet: 409
        page.wait("window.live.video?.videoWidth === 192")
        seen = []
        while len(seen) < 10:
            assert not limit.over or len(seen) > 3, seen
            number, count = page.get(LOOKED)
            # what is shown was painted a moment ago
            assert 0 <= count - number < 60
            seen += [number] if not seen or number != seen[-1] else []
        assert seen == sorted(set(seen))
    finally:
        page.get("""(() => { clearInterval(window.live.paint); window.live.up.close()
            window.live.down?.close(); window.live.socket.close()
            const { session, token } = window.live.run
            return fetch('/livediffusion/stop', { method: 'POST',
              body: JSON.stringify({ session, token }) }) })()""")
