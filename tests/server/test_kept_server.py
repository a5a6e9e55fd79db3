"""A run without a page in a real ComfyUI that is killed and started again."""

import json
import time
import urllib.request

import pytest
from clock import Limit
from films import write_gif
from serving import serving

pytestmark = [pytest.mark.comfy, pytest.mark.server, pytest.mark.slow]

GRAPH = {
    "1": {"class_type": "LiveCamera", "inputs": {
        "source": "file", "file": "film.gif", "width": 64, "height": 64, "fit": "crop", "fps": 30,
        "mirror": False, "loop": True}},
    "2": {"class_type": "LiveView", "inputs": {
        "image": ["1", 0], "quality": 80, "record": False, "filename_prefix": "live/kept"}},
}  # fmt: skip


class Site:
    def __init__(self, port, base):
        self._url, self._folder = f"http://127.0.0.1:{port}", base / "user" / "livediffusion"

    def json(self, path, data=None):
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            self._url + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def live(self):
        """What is told of the kept run, once it shows frames."""
        limit = Limit(60)
        while True:
            found = self.json("/livediffusion/runs")["runs"]
            if found and found[0]["state"] == "live" and found[0]["last_frame_age_s"] is not None:
                return found[0]
            assert not limit.over, found
            time.sleep(0.1)

    def heart(self):
        return json.loads((self._folder / "heartbeat.json").read_text("utf-8"))


def test_it_goes_on_after_a_kill_where_the_setting_says_so(comfyui, tmp_path):
    with serving(comfyui, tmp_path) as (port, process, _):
        site = Site(port, tmp_path)
        write_gif(tmp_path / "input" / "film.gif", 4, 50)
        # as ComfyUI's page writes it
        site.json("/settings/livediffusion.startUnattended", True)
        body = {"prompt": GRAPH, "client_id": "c", "workflow": {"id": "w"}, "unattended": True,
                "name": "Window"}  # fmt: skip
        begun = site.json("/livediffusion/start", body)
        assert begun["warning"] is None
        assert site.live()["run"] == begun["run"]
        # an edit is what goes on
        edited = json.loads(json.dumps(GRAPH))
        edited["1"]["inputs"]["width"] = 128
        keys = {"session": begun["session"], "token": begun["token"]}
        body = {**keys, "prompt": edited, "workflow": {"id": "w"}}
        assert site.json("/livediffusion/update", body)["version"] == 2
        written, limit = tmp_path / "user" / "livediffusion" / "runs.json", Limit(30)
        while '"width":128' not in written.read_text("utf-8"):
            assert not limit.over
            time.sleep(0.1)
        process.kill()
        process.wait()
    before = site.heart()
    with serving(comfyui, tmp_path) as (port, process, _):
        site = Site(port, tmp_path)
        told = site.live()
        assert (told["run"], told["name"], told["workflow"]) == (begun["run"], "Window", "w")
        limit = Limit(30)
        while (heart := site.heart())["process"] == before["process"] or not heart["runs"]:
            assert not limit.over, heart
            time.sleep(0.1)
        assert heart["runs"][0]["run"] == begun["run"]
        attached = site.json("/livediffusion/attach", {"run": told["run"]})
        assert attached["cameras"][0]["width"] == 128
        # ComfyUI's cancel ends it for good
        site.json("/interrupt", {})
        limit = Limit(30)
        while site.json("/livediffusion/runs")["runs"]:
            assert not limit.over
            time.sleep(0.1)
    assert json.loads(written.read_text("utf-8"))["runs"] == []
