"""What of a served workflow leads out of the house is the operator's alone."""

import pytest
from serving import ROOT, served

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


def looking(source, image):
    """A graph of a camera with this source, and of a second one; the view shows `image`."""
    return {
        "1": {"class_type": "LiveCamera", "inputs": {"source": source, "width": 64}},
        "2": {"class_type": "LiveCamera", "inputs": {"source": "browser", "width": 64}},
        "4": {"class_type": "LiveView", "inputs": {"image": [image, 0], "quality": 85}},
    }


@pytest.mark.parametrize("source", ["screen", "phone", "whip"])
def test_a_camera_that_only_comfyuis_own_page_feeds_is_refused(source):
    """It would wait for its first picture until the house is given up."""
    with pytest.raises(ValueError, match=rf"source of Live Camera \(node 1\) is {source}:.*\.$"):
        w.Exposed.load(looking(source, "1"), INFO)
    # one that gives nothing to anybody is not run
    w.Exposed.load(looking(source, "2"), INFO)


@pytest.mark.parametrize("source", ["browser", "file", "device", "address", "ndi", "spout"])
def test_every_other_source_is_the_servers_or_a_visitors(source):
    w.Exposed.load(looking(source, "1"), INFO)


def test_a_house_takes_no_more_than_its_comfyuis_do():
    graph = looking("browser", "1")
    graph |= {f"v{i}": graph["4"] for i in range(w.boundary.MOST_VIEWS + 5)}
    assert len(w.Exposed.load(graph, INFO).views) == w.boundary.MOST_VIEWS
    words = (ROOT / "docs" / "serve.md").read_text("utf-8")
    for most, what in ((w.boundary.MOST_VIEWS, "views"), (w.boundary.MOST_NODES, "nodes")):
        assert f"{most:,} {what}" in words
