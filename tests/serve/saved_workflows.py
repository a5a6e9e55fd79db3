"""Workflows as ComfyUI's page saves them, each with one thing that turning it into a prompt needs.

tests/browser/test_prompts.py compares what serve/workflow/prompt.py makes of them with what the
page makes.
"""

import itertools

SUBGRAPH = "5d0c2f3e-8f7a-4f0e-9d55-0a1b2c3d4e5f"
INNER = "6e1d3a4f-9a8b-4c1f-8e66-1b2c3d4e5f60"

CAMERA = ["browser", "none", 256, 256, "crop", 30, True, True]
SHARP = ("image:IMAGE", "sharpen_radius:INT*", "sigma:FLOAT*", "alpha:FLOAT*")
BLUR = ("image:IMAGE", "blur_radius:INT*", "sigma:FLOAT*")
SCALE = ("image:IMAGE", "upscale_method:COMBO*", "width:INT*", "height:INT*", "crop:COMBO*")
BLEND = ("image1:IMAGE", "image2:IMAGE", "blend_factor:FLOAT*", "blend_mode:COMBO*")
TEXT = ("clip:CLIP", "text:STRING*")
OUTSIDE = ("image:IMAGE", "blur_radius:INT*", "alpha:FLOAT*")  # of the definition _sharpened


class Saved:
    """A graph that is being written: the root, or a subgraph's definition."""

    def __init__(self):
        self.nodes, self.links = {}, []
        self._numbers = itertools.count(1)

    def node(self, id, kind, values=(), inputs=(), outputs=(), mode=0, **more):
        """inputs: "name:TYPE", with a * behind it where it is a widget's; outputs: types."""
        slots = []
        for one in inputs:
            name, _, type_ = one.partition(":")
            slot = {"name": name, "type": type_, "link": None}
            if len(type_) > 1 and type_.endswith("*"):
                slot |= {"type": type_[:-1], "widget": {"name": name}}
            slots.append(slot)
        self.nodes[id] = {
            "id": id, "type": kind, "pos": [300 * (id % 7), 200 * (id // 7)], "size": [200, 100],
            "flags": {}, "order": len(self.nodes), "mode": mode, "inputs": slots,
            "outputs": [{"name": t, "type": t, "links": []} for t in outputs],
            "properties": {},
            "widgets_values": values if isinstance(values, dict) else list(values), **more,
        }  # fmt: skip

    def link(self, origin, slot, target, name):
        """From an output to an input, which is named by its place or its name; its number."""
        number = next(self._numbers)
        type_, at = "*", name
        if origin in self.nodes:
            out = self.nodes[origin]["outputs"][slot]
            out["links"].append(number)
            type_ = out["type"]
        if target in self.nodes:
            slots = self.nodes[target]["inputs"]
            at = next(i for i, one in enumerate(slots) if name in (i, one["name"]))
            slots[at]["link"] = number
            type_ = slots[at]["type"] if type_ == "*" else type_
            if origin in self.nodes and self.nodes[origin]["type"] == "PrimitiveNode":
                out["widget"] = {"name": slots[at]["name"]}
        self.links.append((number, origin, slot, target, at, type_))
        return number

    def root(self, *definitions, linear=None):
        made = {
            "id": "11111111-2222-4333-8444-555555555555", "revision": 0, "last_node_id": 90,
            "last_link_id": 90, "nodes": list(self.nodes.values()),
            "links": [list(one) for one in self.links], "groups": [], "config": {},
            "extra": {"linearData": linear} if linear else {}, "version": 0.4,
        }  # fmt: skip
        if definitions:
            made["definitions"] = {"subgraphs": list(definitions)}
        return made

    def definition(self, id, name, inputs=(), outputs=()):
        """inputs and outputs: (name, type, numbers of links)."""

        def ends(kind, listed):
            return [{"id": f"{id[:-2]}{kind}{i}", "name": n, "type": t, "linkIds": list(numbers)}
                    for i, (n, t, numbers) in enumerate(listed)]  # fmt: skip

        return {
            "id": id, "version": 1, "revision": 0, "name": name, "config": {}, "groups": [],
            "state": {"lastGroupId": 0, "lastNodeId": 90, "lastLinkId": 90, "lastRerouteId": 0},
            "inputNode": {"id": -10, "bounding": [-200, 0, 100, 100]},
            "outputNode": {"id": -20, "bounding": [900, 0, 100, 100]},
            "inputs": ends("a", inputs), "outputs": ends("b", outputs), "widgets": [],
            "nodes": list(self.nodes.values()),
            "links": [{"id": n, "origin_id": o, "origin_slot": s, "target_id": t, "target_slot": at,
                       "type": type_} for n, o, s, t, at, type_ in self.links],
        }  # fmt: skip


def ends():
    """A camera, 1, and a view, 9."""
    made = Saved()
    made.node(1, "LiveCamera", CAMERA, outputs=["IMAGE", "INT"])
    made.node(9, "LiveView", [80, False, "live/recording"], ["image:IMAGE"])
    return made


def blurred(mode=0):
    """And a blur, 2, between them."""
    made = ends()
    made.node(2, "ImageBlur", [3, 0.8], BLUR, ["IMAGE"], mode)
    made.link(1, 0, 2, "image")
    made.link(2, 0, 9, "image")
    return made


def reroutes():
    made = ends()
    for id in range(20, 26):
        made.node(id, "Reroute", [], [":*"], ["*"])
        made.link(id - 1 if id > 20 else 1, 0, id, 0)
    made.link(25, 0, 9, "image")
    return made.root()


def bypassed():
    made = blurred(mode=4)
    made.node(3, "ImageScale", ["bilinear", 64, 64, "disabled"], SCALE, ["IMAGE"], 4)
    made.node(4, "ImageSharpen", [1, 1.0, 0.5], SHARP, ["IMAGE"])
    made.link(2, 0, 3, "image")
    made.link(3, 0, 4, "image")
    # a type that none of its inputs has: nothing comes of it
    made.node(5, "LiveDemoModel", [], [], ["MODEL", "CLIP", "VAE"], 4)
    made.node(6, "CLIPTextEncode", ["a"], TEXT, ["CONDITIONING"])
    made.link(5, 1, 6, "clip")
    return made.root()


def bypassed_by_type():
    """Of several inputs, the one in the output's place, else the first of its type."""
    made = ends()
    made.node(2, "ImageBlend", [0.5, "normal"], BLEND, ["IMAGE"], 4)
    made.node(3, "ImageBlur", [3, 0.8], BLUR, ["IMAGE"])
    made.node(5, "MaskToImage", [], ["mask:MASK"], ["IMAGE"], 4)
    made.link(1, 0, 3, "image")
    made.link(3, 0, 2, "image1")
    made.link(1, 0, 2, "image2")
    made.link(2, 0, 9, "image")
    made.node(6, "ImageSharpen", [1, 1.0, 0.5], SHARP, ["IMAGE"])
    made.link(5, 0, 6, "image")
    switch = ["on_false:IMAGE", "on_true:IMAGE", "switch:BOOLEAN*"]
    made.node(7, "ComfySwitchNode", [True], switch, ["IMAGE"], 4)
    made.node(8, "ImageInvert", [], ["image:IMAGE"], ["IMAGE"])
    made.link(3, 0, 7, "on_false")
    made.link(1, 0, 7, "on_true")
    made.link(7, 0, 8, "image")
    return made.root()


def muted():
    made = blurred(mode=2)
    made.node(4, "ImageSharpen", [1, 1.0, 0.5], SHARP, ["IMAGE"])
    made.node(20, "Reroute", [], [":*"], ["*"])
    made.link(2, 0, 20, 0)
    made.link(20, 0, 4, "image")
    return made.root()


def primitives():
    made = blurred()
    made.node(3, "PrimitiveNode", [7, "randomize"], [], ["INT"])
    made.node(4, "PrimitiveNode", ["a quiet sea"], [], ["STRING"])
    made.node(5, "CLIPTextEncode", ["not this"], TEXT, ["CONDITIONING"])
    made.node(6, "PrimitiveNode", [3.5, "fixed"], [], ["FLOAT"], 2)
    made.link(3, 0, 2, "blur_radius")
    made.link(4, 0, 5, "text")
    made.link(6, 0, 2, "sigma")
    return made.root(linear={"inputs": [[3, "value"], [4, "value"]], "outputs": [9]})


def converted():
    """A widget that another node gives; its own value stays in the list."""
    made = blurred()
    made.link(1, 1, 2, "blur_radius")
    return made.root()


def notes():
    made = blurred()
    made.node(3, "Note", ["read me"])
    made.node(4, "MarkdownNote", ["# read me"])
    return made.root()


def seeds():
    """Widgets that are in the list of values and not in the prompt."""
    made = blurred()
    names = ["seed:INT*", "steps:INT*", "cfg:FLOAT*", "sampler_name:COMBO*", "scheduler:COMBO*",
             "denoise:FLOAT*"]  # fmt: skip
    made.node(3, "KSampler", [77, "randomize", 8, 2.5, "euler", "normal", 0.7],
              ["model:MODEL", "positive:CONDITIONING", *names], ["LATENT"])  # fmt: skip
    made.node(4, "RandomNoise", [5, "fixed"], ["noise_seed:INT*"], ["NOISE"])
    made.node(5, "LoadImage", ["a.png", "image"], ["image:COMBO*"], ["IMAGE", "MASK"])
    made.node(6, "LoadVideo", ["a.mp4", "image"], ["file:COMBO*"], ["VIDEO"])
    made.node(7, "LoadAudio", ["a.mp3", ""], ["audio:COMBO*"], ["AUDIO"])
    return made.root()


def values():
    """Lists that are shorter than the widgets, a combo of nothing, choices in texts."""
    made = blurred()
    made.nodes[2]["widgets_values"] = [9]
    made.node(3, "ImageScale", [None, 128], SCALE, ["IMAGE"])
    made.node(4, "ImageSharpen", [], SHARP, ["IMAGE"])
    strings = ["string_a:STRING*", "string_b:STRING*", "delimiter:STRING*"]
    made.node(5, "StringConcatenate", ["{a|a} /* no */ b", "\\{c\\}", ""], strings, ["STRING"])
    made.node(6, "CLIPTextEncode", ["{a|a} // no\n{b {c|c}|b {c|c}} \\{d\\} {\\{|\\{} /* no */ e"],
              TEXT, ["CONDITIONING"])  # fmt: skip
    made.node(7, "SaveText", ["what was a widget once", "text/ComfyUI", "txt"],
              ["text:STRING", "filename_prefix:STRING*", "format:COMBO*"])  # fmt: skip
    return made.root()


def dynamic_combos():
    made = ends()
    made.node(2, "ResizeImageMaskNode", ["scale longer dimension", 96, "lanczos"],
              ["input:IMAGE", "resize_type:COMFY_DYNAMICCOMBO_V3*",
               "resize_type.longer_size:INT*", "scale_method:COMBO*"], ["IMAGE"])  # fmt: skip
    made.node(3, "ResizeImageMaskNode", [], ["input:IMAGE"], ["IMAGE"])
    made.node(4, "CreateCameraInfo", ["look_at"], [], ["LOAD3D_CAMERA"])
    made.link(1, 0, 2, "input")
    made.link(2, 0, 3, "input")
    made.link(3, 0, 9, "image")
    # what gives a value that belongs to the option
    made.link(1, 1, 2, "resize_type.longer_size")
    return made.root()


def growing():
    made = ends()
    made.node(2, "BatchImagesNode", [],
              ["images.image0:IMAGE", "images.image1:IMAGE", "images.image2:IMAGE"],
              ["IMAGE"])  # fmt: skip
    made.link(1, 0, 2, 0)
    made.link(1, 0, 2, 1)
    made.link(2, 0, 9, "image")
    return made.root()


def _sharpened(id=SUBGRAPH, first=11):
    """A definition: an image, the radius of a blur, and the strength of a sharpening after it."""
    inner = Saved()
    inner.node(first, "ImageBlur", [3, 0.8], BLUR, ["IMAGE"])
    inner.node(first + 1, "ImageSharpen", [1, 1.0, 0.5], SHARP, ["IMAGE"])
    inner.link(first, 0, first + 1, "image")
    image, radius = inner.link(-10, 0, first, "image"), inner.link(-10, 1, first, "blur_radius")
    alpha = inner.link(-10, 2, first + 1, "alpha")
    out = inner.link(first + 1, 0, -20, 0)
    slots = [("image", "IMAGE", [image]), ("blur_radius", "INT", [radius])]
    return inner.definition(
        id, "Sharpened", [*slots, ("alpha", "FLOAT", [alpha])], [("IMAGE", "IMAGE", [out])]
    )


def subgraphs():
    """One definition used three times, each with its own values; one value is another node's."""
    made = ends()
    made.node(2, SUBGRAPH, [5, 0.25], OUTSIDE, ["IMAGE"])
    made.node(3, SUBGRAPH, [6, 0.75], OUTSIDE, ["IMAGE"])
    made.node(4, SUBGRAPH, [], OUTSIDE, ["IMAGE"])
    made.link(1, 0, 2, "image")
    made.link(2, 0, 3, "image")
    made.link(3, 0, 4, "image")
    made.link(4, 0, 9, "image")
    made.link(1, 1, 3, "blur_radius")
    return made.root(
        _sharpened(), linear={"inputs": [[2, "blur_radius"], [3, "alpha"]], "outputs": [9]}
    )


def subgraph_modes():
    made = ends()
    for id, mode in ((2, 4), (3, 2), (4, 0)):
        made.node(id, SUBGRAPH, [5, 0.25], OUTSIDE, ["IMAGE"], mode)
    made.link(1, 0, 2, "image")
    made.link(2, 0, 4, "image")
    made.link(3, 0, 9, "image")
    definition = _sharpened()
    definition["nodes"][0]["mode"] = 4
    return made.root(definition)


def nested(mode=0):
    """A subgraph in a subgraph, with a value handed through both; a reroute on the way."""
    inner = Saved()
    inner.node(21, SUBGRAPH, [4, 0.125], OUTSIDE, ["IMAGE"], mode)
    inner.node(22, "Reroute", [], [":*"], ["*"])
    inner.node(23, "ImageInvert", [], ["image:IMAGE"], ["IMAGE"])
    image, radius = inner.link(-10, 0, 22, 0), inner.link(-10, 1, 21, "blur_radius")
    inner.link(22, 0, 21, "image")
    inner.link(21, 0, 23, "image")
    out, through = inner.link(23, 0, -20, 0), inner.link(22, 0, -20, 1)
    outer = inner.definition(
        INNER, "Outer", [("image", "IMAGE", [image]), ("radius", "INT", [radius])],
        [("IMAGE", "IMAGE", [out]), ("before", "IMAGE", [through])],
    )  # fmt: skip
    made = ends()
    made.node(2, INNER, [8], ["image:IMAGE", "radius:INT*"], ["IMAGE", "IMAGE"])
    made.node(3, "ImageBlend", [0.5, "normal"], BLEND, ["IMAGE"])
    made.link(1, 0, 2, "image")
    made.link(2, 0, 3, "image1")
    made.link(2, 1, 3, "image2")
    made.link(3, 0, 9, "image")
    return made.root(_sharpened(), outer, linear={"inputs": [[2, "radius"]], "outputs": [9]})


def nested_bypassed():
    return nested(mode=4)


def nested_muted():
    return nested(mode=2)


def _proxied(values, proxies, primitive=False):
    """As older pages saved it: values of nodes inside that are shown outside."""
    inner = Saved()
    inner.node(11, "ImageBlur", [3, 0.8], BLUR, ["IMAGE"])
    inner.node(12, "ImageSharpen", [1, 1.0, 0.5], SHARP, ["IMAGE"])
    inner.link(11, 0, 12, "image")
    if primitive:
        inner.node(13, "PrimitiveNode", [4, "fixed"], [], ["INT"])
        inner.link(13, 0, 11, "blur_radius")
        inner.link(13, 0, 12, "sharpen_radius")
    image, out = inner.link(-10, 0, 11, "image"), inner.link(12, 0, -20, 0)
    made = ends()
    properties = {"proxyWidgets": proxies}
    made.node(2, SUBGRAPH, values, ["image:IMAGE"], ["IMAGE"], properties=properties)
    made.link(1, 0, 2, "image")
    made.link(2, 0, 9, "image")
    return made.root(
        inner.definition(SUBGRAPH, "Old", [("image", "IMAGE", [image])],
                         [("IMAGE", "IMAGE", [out])]),
        linear={"inputs": [[11, "sigma"]], "outputs": [9]},
    )  # fmt: skip


def proxies():
    return _proxied([9, 0.25], [["11", "blur_radius"], ["12", "alpha"], ["11", "sigma"]])


def proxies_without_values():
    return _proxied([], [["11", "blur_radius"], ["12", "sigma"], ["11", "sigma"]])


def proxied_primitive():
    return _proxied([6], [["13", "value"]], primitive=True)


def unproxied_primitive():
    return _proxied([], [], primitive=True)


def same_ids():
    """Nodes of two definitions that have the same numbers."""
    made = ends()
    made.node(2, SUBGRAPH, [5, 0.25], OUTSIDE, ["IMAGE"])
    made.node(3, INNER, [6, 0.75], OUTSIDE, ["IMAGE"])
    made.link(1, 0, 2, "image")
    made.link(2, 0, 3, "image")
    made.link(3, 0, 9, "image")
    return made.root(_sharpened(), _sharpened(INNER, first=12))


def links_as_objects():
    """Links of the root as version 1 has them."""
    made = blurred().root()
    made["links"] = [{"id": n, "origin_id": o, "origin_slot": s, "target_id": t, "target_slot": at,
                      "type": k} for n, o, s, t, at, k in made["links"]]  # fmt: skip
    made["version"] = 1
    made["state"] = {"lastGroupId": 0, "lastNodeId": 90, "lastLinkId": 90, "lastRerouteId": 0}
    return made


def primitive_into_subgraph():
    made = ends()
    made.node(2, SUBGRAPH, [5, 0.25], OUTSIDE, ["IMAGE"])
    made.node(3, "PrimitiveNode", [7, "fixed"], [], ["INT"])
    made.link(1, 0, 2, "image")
    made.link(3, 0, 2, "blur_radius")
    made.link(2, 0, 9, "image")
    return made.root(_sharpened())


def cases():
    """name -> workflow."""
    makers = (
        reroutes, bypassed, bypassed_by_type, muted, primitives, converted, notes, seeds, values,
        dynamic_combos, growing, subgraphs, subgraph_modes, nested, nested_bypassed, nested_muted,
        proxies, proxies_without_values, proxied_primitive, unproxied_primitive, same_ids,
        links_as_objects, primitive_into_subgraph,
    )  # fmt: skip
    return {maker.__name__: maker() for maker in makers}
