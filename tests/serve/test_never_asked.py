"""What a visitor of a house may never say: where pictures come from, and where they go to."""

import pytest
from serving import served

Exposed = served("workflow.exposed").Exposed
CAMERA = {
    "source": ["COMBO", {"options": ["browser", "file"]}], "file": [["none", "a.mp4"], {}],
    "width": ["INT", {"default": 512, "min": 64, "max": 2048}],
}  # fmt: skip


def node(name, required, optional=None, output=()):
    return {"name": name, "display_name": name, "output": list(output),
            "input": {"required": required, "optional": optional or {}}}  # fmt: skip


def test_where_pictures_come_from_and_go_to_is_never_a_visitors_to_say():
    """Not by a workflow that shows it, nor by the command line, nor by a text that leads there."""
    text = ["STRING", {"default": ""}]
    info = {one["name"]: one for one in (
        node("LiveCamera", CAMERA, {"device": text, "address": text, "sender": text},
             output=["IMAGE", "INT"]),
        node("LiveView", {"image": ["IMAGE", {}],
                          "quality": ["INT", {"default": 85, "min": 1, "max": 100}]}),
        node("LiveSend", {"image": ["IMAGE"], "to": ["COMBO", {"options": ["stream"]}],
                          "name": text, "address": text}),
        node("Text", {"value": text}, output=["STRING"]),
    )}  # fmt: skip
    camera = {"source": "address", "file": "none", "device": "", "address": "rtsp://10.0.0.5/",
              "sender": "", "width": 64}  # fmt: skip
    graph = {
        "1": {"class_type": "LiveCamera", "inputs": camera},
        "2": {"class_type": "Text", "inputs": {"value": "rtmp://10.0.0.5/app/key"}},
        "3": {"class_type": "LiveSend", "inputs": {
            "image": ["1", 0], "to": "stream", "name": "", "address": ["2", 0]}},
        "4": {"class_type": "LiveView", "inputs": {"image": ["1", 0], "quality": 85}},
    }  # fmt: skip
    for name in ("1.source", "1.device", "1.address", "1.sender", "2.value", "3.to", "3.name",
                 "3.address"):  # fmt: skip
        with pytest.raises(ValueError, match=rf"Input {name} "):
            Exposed.load(graph, info, [name])
    exposed = Exposed.load(graph, info, ["1.width", "4.quality"])
    assert [one["name"] for one in exposed.inputs] == ["1.width", "4.quality"]
    with pytest.raises(ValueError, match="no input"):
        exposed.check({"1.address": "rtsp://169.254.169.254/"})
