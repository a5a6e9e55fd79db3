"""What of a workflow a house shows to its visitors, and the prompt for what they chose.

A workflow is a file that ComfyUI's page saved, whose App mode names inputs and outputs
(`extra.linearData`), or an export in API format, for which the command line names them. It may be
anybody's: nothing of it is believed, and all of it is bounded.
"""

import copy
import math
import pathlib
import random
import urllib.parse
from collections.abc import Iterable
from typing import Any, NamedTuple

from trust import boundary, schema

from . import widgets
from .prompt import Place, Prompt, to_prompt
from .saved import MOST_NODES
from .widgets import Widget

# the widget of Live Camera that picks a camera, made by the pack's own part of the page
CAMERA = "livediffusion_camera"
# what says from where and to where: the operator's alone, whatever the workflow shows
_ENDS = {
    "LiveCamera": ("source", "device", "address", "sender"),
    "LiveSend": ("to", "name", "address"),
}
# who sends it: ComfyUI's own page, or somebody whom that page gives a code or a key
_SENT = {
    "screen": "a screen is shared by ComfyUI's own page",
    "phone": "a phone is let in by ComfyUI's own page",
    "whip": "what publishes gets its key from ComfyUI's own page",
}  # fmt: skip
_FILE = schema.Limits(bytes=16 * 2**20, depth=64, items=1_000_000)
_MOST_INPUTS = 100  # that visitors may set
_MOST_TEXT = 2_000  # characters of a visitor's text
_MOST_CHOICES = 2_000
_MOST_VIEWS = boundary.MOST_VIEWS
_LARGEST = 2048  # what the page has for a number without a maximum
_TYPES = {
    "STRING": "text", "INT": "integer", "FLOAT": "number", "BOOLEAN": "boolean", "COMBO": "choice",
    "COLOR": "text", "TEXTAREA": "text", "MARKDOWN": "text", widgets.DYNAMIC: "choice",
}  # fmt: skip

_id = schema.either(schema.whole(-(2**53), 2**53), schema.text(100))
_anything = schema.anything
_word = schema.either(schema.text(500), schema.whole(-1, 2**31))  # of a type; some are numbers
_place = schema.whole(0, 1000)
_link = schema.either(schema.whole(0, 2**53), schema.nothing)


def _maybe(inner: schema.Schema) -> schema.Schema:
    return schema.either(schema.nothing, inner)


_slots = _maybe(schema.items(schema.record(
    {"name": schema.text(500)},
    {
        "type": _maybe(schema.either(_word, schema.items(_anything, 0, 100_000))), "link": _link,
        "label": _maybe(schema.text(500)),
        "widget": _maybe(schema.record({}, {"name": schema.text(500)}, others=True)),
    },
    others=True,
), 0, 1000))  # fmt: skip
_ends = _maybe(schema.items(schema.record(
    {"name": schema.text(500)},
    {
        "type": _maybe(_word), "label": _maybe(schema.text(500)),
        "linkIds": _maybe(schema.items(schema.whole(0, 2**53), 0, MOST_NODES)),
    },
    others=True,
), 0, 1000))  # fmt: skip
_nodes = schema.items(schema.record(
    {"id": _id, "type": schema.text(500)},
    {
        "mode": _maybe(schema.whole(0, 10)), "title": _maybe(schema.text(2000)),
        "inputs": _slots, "outputs": _slots, "properties": _maybe(
            schema.table(_anything, _anything, 1000)),
        "widgets_values": _maybe(schema.either(
            schema.items(_anything, 0, 10_000), schema.table(_anything, _anything, 10_000))),
    },
    others=True,
), 0, MOST_NODES)  # fmt: skip
_links = _maybe(schema.items(schema.either(
    schema.record(
        {"id": schema.whole(0, 2**53), "origin_id": _id, "origin_slot": schema.whole(-1, 1000),
         "target_id": _id},
        others=True,
    ),
    schema.fields(schema.whole(0, 2**53), _id, _place, _id, _place, _anything),
), 0, 100_000))  # fmt: skip
_linear = schema.record(
    {},
    {
        "inputs": _maybe(schema.items(
            schema.either(schema.fields(_id, schema.text(500)),
                          schema.fields(_id, schema.text(500), _anything)), 0, _MOST_INPUTS)),
        "outputs": _maybe(schema.items(_id, 0, 1000)),
    },
    others=True,
)  # fmt: skip
_WORKFLOW = schema.unchanged(schema.record(
    {"nodes": _nodes},
    {
        "links": _links,
        "definitions": _maybe(schema.record({}, {"subgraphs": _maybe(schema.items(
            schema.record(
                {"id": schema.text(100), "nodes": _maybe(_nodes)},
                {"name": _maybe(schema.text(500)), "links": _links, "inputs": _ends,
                 "outputs": _ends},
                others=True,
            ), 0, 1000))}, others=True)),
        "extra": _maybe(schema.record({}, {"linearData": _maybe(_linear)}, others=True)),
    },
    others=True,
))  # fmt: skip
_API = schema.unchanged(schema.table(schema.text(200), schema.record(
    {"class_type": schema.text(500), "inputs": schema.table(schema.text(500), _anything, 1000)},
    {"_meta": _maybe(schema.record({}, {"title": _maybe(schema.text(2000))}, others=True))},
    others=True,
), MOST_NODES))  # fmt: skip


class _Input(NamedTuple):
    shown: dict[str, Any]
    widget: Widget
    takers: list[tuple[str, str]]


class Exposed:
    """A workflow, the inputs of it that a visitor may set, and the views that a visitor sees.

    Attributes:
        title: of the workflow.
        inputs: what a page needs to show each: name ("3.text"), label, type (text, number, integer,
            boolean, choice or camera), value, min, max, step, options, multiline, tooltip, node
            (the title of its node), node_type, input.
        views: {"node", "title"} of each Live View that is shown.
        camera: whether visitors bring a camera; else all of them see the operator's film.
        notes: sentences for the operator: inputs that the workflow names and that cannot be set,
            and what else of it may surprise.
    """

    def __init__(self, title: str, prompt: Prompt, named: Iterable[tuple[str, str | None]],
                 outputs: list[str] | None, info: dict[str, Any]):  # fmt: skip
        self.title = title
        self.notes: list[str] = []
        self._graph, self._info = prompt.graph, info
        self._leading = _leading(prompt.graph)
        self._inputs: dict[str, _Input] = {}
        self.inputs: list[dict[str, Any]] = []
        for key, label in named:
            self._expose(key, label, prompt.places)
        self.camera = any(node["class_type"] == "LiveCamera"
                          and node["inputs"].get("source") == "browser"
                          for node in self._graph.values())  # fmt: skip
        self.views = self._shown(outputs)

    @classmethod
    def load(
        cls, source: str | pathlib.Path | dict[str, Any], object_info: dict[str, Any],
        extra_inputs: Iterable[str] = (),
    ) -> "Exposed":  # fmt: skip
        """Read a workflow.

        Args:
            source: a file, or what is in it.
            object_info: what the ComfyUI that is to run it says at /object_info.
            extra_inputs: "NODE.NAME" of further inputs to show.

        Raises:
            ValueError: nothing can be made of it; the message says why and what to do.
        """
        title = "Live"
        if not isinstance(source, dict):
            path = pathlib.Path(source)
            title = path.stem.replace("_", " ").strip() or title
            source = read(path)
        else:
            check(source)
        return cls._of(source, title, object_info, list(extra_inputs))

    @classmethod
    def _of(
        cls, saved: dict[str, Any], title: str, info: dict[str, Any], extra: list[str]
    ) -> "Exposed":
        if "nodes" not in saved:
            prompt, named, outputs = _api(saved, info), [], None
        else:
            prompt = to_prompt(saved, info)
            linear = (saved.get("extra") or {}).get("linearData") or {}
            named = [(_key(entry[0], entry[1], saved, prompt), None)
                     for entry in linear.get("inputs") or ()]  # fmt: skip
            outputs = [str(one) for one in linear.get("outputs") or ()] or None
        if len(prompt.graph) > boundary.MOST_NODES:
            raise ValueError(
                f"{len(prompt.graph)} nodes are more than the {boundary.MOST_NODES} that a live "
                "run takes, those in subgraphs included. Remove some."
            )
        made = cls(title, prompt, named, outputs, info)
        for key in extra:
            before = len(made.notes)
            made._expose(key, None, prompt.places)
            if len(made.notes) > before:
                raise ValueError(made.notes[-1])
        if not made.views:
            raise ValueError("There is no Live View in it; add one, it is what visitors see.")
        made._look_at_sources()
        return made

    def check(self, values: Any) -> dict[str, Any]:
        """What a visitor chose, by name; an input that is not there keeps its value.

        Raises:
            ValueError: a name or a value is not allowed; one sentence.
        """
        if not isinstance(values, dict):
            raise ValueError("Values are expected as an object of names.")
        if len(values) > len(self._inputs):
            raise ValueError("There are more values than inputs.")
        checked = {}
        for name, value in values.items():
            known = self._inputs.get(name) if isinstance(name, str) else None
            if known is None or known.shown["type"] == "camera":
                raise ValueError(f"There is no input {schema.shown(name)} to set.")
            checked[name] = _checked(known.shown, value)
        return checked

    def graph(self, values: dict[str, Any], draw: random.Random | None = None) -> dict[str, Any]:
        """The prompt in API format.

        Args:
            values: by name, as `check` takes them.
            draw: chooses where a text has {a|b}.
        """
        draw = draw or random.Random()
        graph = copy.deepcopy(self._graph)
        for name, value in self.check(values).items():
            _, widget, takers = self._inputs[name]
            for node, slot in takers:
                self._set(graph[node]["inputs"], slot, widget, value)
        for entry in graph.values():
            for one in widgets.inputs(self._info.get(entry["class_type"]) or {}):
                text = entry["inputs"].get(one.name)
                if one.options.get("dynamicPrompts") is True and isinstance(text, str):
                    entry["inputs"][one.name] = widgets.prompt_text(text, draw)
        return graph

    # inside

    def _set(self, inputs: dict[str, Any], slot: str, widget: Widget, value: Any) -> None:
        if widget.kind == widgets.DYNAMIC and inputs.get(slot) != value:
            for name in [one for one in inputs if one.startswith(f"{slot}.")]:
                if not isinstance(inputs[name], list):
                    del inputs[name]
            for option in widget.options["options"]:
                if option["key"] == value:
                    for one in widgets.sub_widgets(option, slot):
                        inputs.setdefault(one.name, widgets.sent(one.value, one.kind))
        inputs[slot] = widgets.sent(value, widget.kind)

    def _expose(self, key: str, label: str | None, places: dict[str, Place]) -> None:
        if key in self._inputs:
            return
        if len(self._inputs) >= _MOST_INPUTS:
            raise ValueError(f"More than {_MOST_INPUTS} inputs are shown; choose fewer.")
        node, _, name = key.partition(".")
        entry = self._graph.get(node)
        if name == CAMERA and entry and entry["class_type"] == "LiveCamera":
            widget = Widget(CAMERA, "", {}, None)
            shown = self._camera(key, entry)
            self._put(_Input(shown, widget, []))
            return
        place = places.get(key)
        if place is None:
            self.notes.append(
                f"Input {schema.shown(key, 120)} is not there, or another node gives it; choose "
                "the inputs of App mode again, or name one as NODE.NAME."
            )
            return
        shown = _shown(key, label, place)
        if any(self._leads(node, slot) for node, slot in place.takers):
            shown = "says where pictures come from or go to, which a visitor cannot choose."
        if isinstance(shown, str):
            self.notes.append(f"Input {schema.shown(key, 120)} {shown}")
            return
        self._put(_Input(shown, place.widget, place.takers))

    def _leads(self, node: str, slot: str) -> bool:
        return node in self._leading or slot in _ENDS.get(self._graph[node]["class_type"], ())

    def _look_at_sources(self) -> None:
        """Raises ValueError for a Live Camera that would wait for ever."""
        linked = {str(value[0]) for node in self._graph.values()
                  for value in node["inputs"].values() if isinstance(value, list) and value}
        for id, node in self._graph.items():
            source = node["inputs"].get("source")
            if node["class_type"] == "LiveCamera" and str(source) in _SENT and id in linked:
                raise ValueError(
                    f"The source of Live Camera (node {schema.shown(id)}) is {source}: "
                    f"{_SENT[source]}, and a house has none. Choose browser, each visitor's own "
                    "camera, or another source, in ComfyUI, and save again."
                )
        cameras = [node["inputs"] for node in self._graph.values()
                   if node["class_type"] == "LiveCamera"]  # fmt: skip
        if not cameras:
            self.notes.append(
                "There is no Live Camera in it; add one, unless another pack's node gives frames."
            )
        films = [str(one.get("file")) for one in cameras if one.get("source") == "file"]
        for film in films:
            self.notes.append(
                f"A Live Camera plays {schema.shown(film)}: every visitor sees that film, which "
                "has to be in ComfyUI's input folder."
            )

    def _put(self, one: _Input) -> None:
        self._inputs[one.shown["name"]] = one
        self.inputs.append(one.shown)

    def _camera(self, key: str, entry: dict[str, Any]) -> dict[str, Any]:
        title = (entry.get("_meta") or {}).get("title") or "Live Camera"
        return {"name": key, "label": "Camera", "type": "camera", "value": None, "node": title,
                "node_type": "LiveCamera", "input": CAMERA}  # fmt: skip

    def _shown(self, outputs: list[str] | None) -> list[dict[str, str]]:
        views = [id for id, node in self._graph.items() if node["class_type"] == "LiveView"]
        if outputs is not None:
            # of those that App mode does not show there may be nothing to see
            views = [id for one in outputs for id in views if id == one] or views
        return [{"node": id, "title": (self._graph[id].get("_meta") or {}).get("title")
                 or "Live View"} for id in views[:_MOST_VIEWS]]  # fmt: skip


def _leading(graph: dict[str, Any]) -> set[str]:
    """Nodes that what a Live Camera opens, or where a Live Send sends, comes from."""
    todo = [
        node["inputs"].get(slot)
        for node in graph.values() for slot in _ENDS.get(node["class_type"], ())
    ]  # fmt: skip
    found: set[str] = set()
    while todo:
        link = todo.pop()
        name = str(link[0]) if isinstance(link, list) and link else ""
        if name in graph and name not in found:
            found.add(name)
            todo += graph[name]["inputs"].values()
    return found


def read(path: pathlib.Path) -> dict[str, Any]:
    """A workflow's file, checked.

    Raises:
        ValueError: it is not there, or is none; one sentence.
    """
    name = schema.shown(path.name, 120)
    try:
        with path.open("rb") as file:
            data = file.read(_FILE.bytes + 1)
    except OSError as reason:
        raise ValueError(f"{name} cannot be read: {reason.strerror}.") from None
    saved = schema.parsed(data, name, _FILE)
    check(saved, name)
    return saved


def check(saved: Any, name: str = "The workflow") -> None:
    """Raises ValueError for what is neither a saved workflow nor an export in API format."""
    if not isinstance(saved, dict):
        raise ValueError(f"{name}: a workflow is expected, as ComfyUI's Workflow > Save makes.")
    if "nodes" in saved:
        _WORKFLOW(saved, name)
    elif saved and all(isinstance(one, dict) and "class_type" in one for one in saved.values()):
        _API(saved, name)
    else:
        raise ValueError(
            f"{name}: this is neither a workflow nor its export in API format; save it in ComfyUI "
            "with Workflow > Save."
        )


def _api(saved: dict[str, Any], info: dict[str, Any]) -> Prompt:
    """A prompt as it came, and what of it can be set."""
    kinds = {node["class_type"]: None for node in saved.values()}
    missing = [schema.shown(kind) for kind in kinds if kind not in info]
    if missing:
        named = ", ".join(missing[:5])
        raise ValueError(f"Nodes are not in this ComfyUI: {named}; install their packs.")
    places = {}
    graph = {}
    for id, node in saved.items():
        definition = info[node["class_type"]]
        title = (node.get("_meta") or {}).get("title") or definition.get("display_name")
        graph[id] = {"class_type": node["class_type"], "inputs": dict(node["inputs"]),
                     "_meta": {"title": title or node["class_type"]}}  # fmt: skip
        given = node["inputs"]
        for one in widgets.with_values(definition, given):
            if one.sent and one.name in given and not isinstance(given[one.name], list):
                places[f"{id}.{one.name}"] = Place(
                    one, graph[id]["_meta"]["title"], node["class_type"], None, [(id, one.name)]
                )
        for name, value in given.items():
            if isinstance(value, list) and not (
                len(value) == 2 and isinstance(value[0], str) and value[0] in saved
                and isinstance(value[1], int)
            ):  # fmt: skip
                raise ValueError(
                    f"Input {schema.shown(name)} of node {schema.shown(id)} is linked to a node "
                    "that is not there."
                )
    return Prompt(graph, places, {})


def _key(id: Any, name: str, saved: dict[str, Any], prompt: Prompt) -> str:
    """The name of an input that App mode names in one of the ways that it had."""
    id = str(id)
    parts = id.split(":")
    if len(parts) == 3 and not id.replace(":", "").isdigit():
        # graph:node:input, of newer pages; the input may have been renamed since
        return f"{urllib.parse.unquote(parts[1])}.{urllib.parse.unquote(parts[2])}"
    if len(parts) == 2 and (parts[0], parts[1]) in prompt.aliases:
        id = prompt.aliases[parts[0], parts[1]][0]
    key = f"{id}.{name}"
    if key in prompt.places or id in prompt.graph:
        return key
    # a node in a subgraph, of a page that had not yet put its widget on the subgraph's node
    inside = [one for (_, node), ids in prompt.aliases.items() if node == id for one in ids]
    found = {outer for outer, place in prompt.places.items()
             for one in inside if (one, name) in place.takers}  # fmt: skip
    return found.pop() if len(found) == 1 else key


def _shown(key: str, label: str | None, place: Place) -> dict[str, Any] | str:
    """What a page needs to show an input, or why it cannot be shown."""
    widget = place.widget
    kind = _TYPES.get(widget.kind)
    if kind is None:
        return f"is of type {schema.shown(widget.kind)}, which a visitor's page cannot show."
    options = widget.options
    input_name = place.takers[0][1]
    shown = {
        "name": key,
        "label": label or place.label or options.get("display_name") or widget.name,
        "type": kind, "value": widget.value, "node": place.title, "node_type": place.kind,
        "input": input_name,
    }  # fmt: skip
    if isinstance(options.get("tooltip"), str):
        shown["tooltip"] = options["tooltip"]
    if kind in ("number", "integer"):
        value = widget.value
        right = int if kind == "integer" else (int, float)
        if isinstance(value, bool) or not isinstance(value, right) or not math.isfinite(value):
            return f"has a value that is no {kind}; set it in ComfyUI and save again."
        low, high = options.get("min"), options.get("max")
        shown["min"] = min(0, value) if low is None else low
        shown["max"] = max(_LARGEST, value) if high is None else high
        shown["step"] = options.get("step") or (1 if kind == "integer" else 0.01)
    elif kind == "choice":
        shown["options"] = widgets.choices(options)
        if len(shown["options"]) > _MOST_CHOICES:
            return f"has more than {_MOST_CHOICES} choices."
        if not all(isinstance(one, str | int | float) for one in shown["options"]):
            return "has choices that a visitor's page cannot show."
    elif kind == "text":
        shown["value"] = "" if widget.value is None else widget.value
        if not isinstance(shown["value"], str):
            return "has a value that is not text; set it in ComfyUI and save again."
        shown["multiline"] = options.get("multiline") is True or widget.kind != "STRING"
        shown["max"] = max(_MOST_TEXT, len(shown["value"]))
    else:
        shown["value"] = bool(widget.value)
    return shown


def _checked(shown: dict[str, Any], value: Any) -> Any:
    where = schema.shown(shown["label"])
    kind = shown["type"]
    if isinstance(value, int) and abs(value) > schema.LARGEST_WHOLE:
        raise ValueError(f"{where}: the number is too large.")
    if kind == "text":
        text = schema.text(shown["max"])(value, where)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: this is no Unicode text.") from None
        return text
    if kind == "boolean":
        return schema.flag(value, where)
    if kind == "choice":
        # the value that it has is allowed even where it is no choice any more
        for one in (*shown["options"], shown["value"]):
            if type(one) is type(value) and one == value:
                return value
        raise ValueError(f"{where}: {schema.shown(value)} is not one of the choices.")
    if kind == "integer":
        return schema.whole(shown["min"], shown["max"])(value, where)
    return schema.number(shown["min"], shown["max"])(value, where)
