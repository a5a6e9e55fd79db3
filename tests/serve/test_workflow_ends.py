"""What of a served workflow leads out of the house is the operator's alone."""

import pytest
from serving import served

w = served("workflow.exposed")
TEXT = ["STRING", {"default": ""}]
SIZE = ["INT", {"default": 64, "min": 1, "max": 2048}]


def node(name, inputs, output=()):
    return {"name": name, "display_name": name, "output": list(output),
            "input": {"required": inputs, "optional": {}}}  # fmt: skip


INFO = {one["name"]: one for one in (
    node("LiveCamera", {
        "source": ["COMBO", {"options": ["browser", "address"]}], "device": TEXT, "address": TEXT,
        "sender": TEXT, "width": SIZE,
    }, ["IMAGE"]),
    node("LiveSend", {
        "image": ["IMAGE", {}], "to": ["COMBO", {"options": ["stream"]}], "name": TEXT,
        "address": TEXT,
    }),
    node("LiveView", {"image": ["IMAGE", {}], "quality": SIZE}),
    node("Text", {"value": TEXT}, ["STRING"]),
)}  # fmt: skip


def test_where_pictures_come_from_and_go_to_is_never_a_visitors_to_say():
    """Not by a workflow that shows it, nor by the command line, nor by a text that leads there."""
    camera = {"source": "address", "device": "", "address": "rtsp://10.0.0.5/",
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
            w.Exposed.load(graph, INFO, [name])
    exposed = w.Exposed.load(graph, INFO, ["1.width", "4.quality"])
    assert [one["name"] for one in exposed.inputs] == ["1.width", "4.quality"]
    with pytest.raises(ValueError, match="no input"):
        exposed.check({"1.address": "rtsp://169.254.169.254/"})
