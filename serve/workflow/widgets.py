"""The widgets that ComfyUI's page makes for a node, and the values that a workflow has for them.

A saved workflow keeps a node's values as a list without names; which is whose follows from the
node's definition as the server tells it at /object_info, and from rules of the page (frontend
1.49.6: litegraphService.ts, widgets.ts, dynamicWidgets.ts, litegraphUtil.ts).
"""

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
# one value each, kept and sent as it is
PLAIN = frozenset({
    "INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "MARKDOWN", "TEXTAREA", "CURVE", "RANGE",
})  # fmt: skip
# what these hold is made by the page when it sends them, or takes more places than one
_PAGE = frozenset({
    "WEBCAM", "AUDIO_RECORD", "LOAD_3D", "PAINTER", "COMPOSITOR", "VIDEO_EDIT", "BOUNDING_BOX",
    "BOUNDING_BOXES", "COLORS", "CHART", "GALLERIA", "IMAGECOMPARE",
})  # fmt: skip
_PAGE_NODES = frozenset({"CustomCombo"})  # whose widgets come and go with what is typed
_MOST_CHOICES = 200
_SEEDS = ("seed", "noise_seed")
_UPLOADS = ("image_upload", "video_upload", "animated_image_upload")
_COMMENTS = re.compile(r"/\*[\s\S]*?\*/|//[^\n\r\u2028\u2029]*")
_ESCAPED = re.compile(r"\\([{}|])")


class Pages(ValueError):
    """A node whose values only ComfyUI's page can tell; the message is what it has."""


class Input(NamedTuple):
    """One input of a node's definition: its type in the page's words, and its options."""

    name: str
    kind: str
    options: dict[str, Any]


class Widget(NamedTuple):
    """A widget with its value; one that is not `sent` takes a place in the list alone."""

    name: str
    kind: str
    options: dict[str, Any]
    value: Any
    sent: bool = True

    def having(self, value: Any) -> "Widget":
        """The same with a value, None for the one that it has."""
        return self if value is None else self._replace(value=value)


def inputs(definition: dict[str, Any]) -> list[Input]:
    """The inputs of a node, in the order of its page: required, then optional ones."""
    table = definition.get("input") or {}
    required = {name: _input(name, spec) for name, spec in (table.get("required") or {}).items()}
    optional = {name: _input(name, spec) for name, spec in (table.get("optional") or {}).items()}
    if _first(required, _UPLOADS):
        required["upload"] = Input("upload", "IMAGEUPLOAD", {})
    if "audio" in required and required["audio"].options.get("audio_upload") is True:
        required["audioUI"] = Input("audioUI", "AUDIO_UI", {})
        required["upload"] = Input("upload", "AUDIOUPLOAD", {})
    order = definition.get("input_order") or {}
    found = [known[name] for kind, known in (("required", required), ("optional", optional))
             for name in order.get(kind) or () if name in known]  # fmt: skip
    seen = {one.name for one in found}
    return found + [one for one in (required | optional).values() if one.name not in seen]


def has_widget(one: Input) -> bool:
    """Whether the page makes a widget for it, rather than a socket alone."""
    return not one.options.get("forceInput") and (
        one.kind in PLAIN or one.kind in _PAGE or one.kind in (DYNAMIC, *_BUTTONS)
    )


def of_node(kind: str, definition: dict[str, Any], node: dict[str, Any]) -> list[Widget]:
    """The widgets of a saved node with its values, in the order of the page.

    Args:
        kind: the node's type.
        definition: of it, from /object_info.
        node: as the workflow has it.

    Raises:
        Pages: its values cannot be known without a page.
    """
    known = inputs(definition)
    if kind in _PAGE_NODES:
        raise Pages("widgets that come and go")
    for one in known:
        if has_widget(one) and one.kind in _PAGE:
            raise Pages(f"{one.name} ({one.kind})")
        if one.kind == "COMBO" and one.options.get("remote"):
            raise Pages(f"{one.name}, a list that the page asks for")
        if one.kind == "COMFY_AUTOGROW_V3" and _grows_widgets(one):
            raise Pages(f"{one.name}, widgets that come and go")
    stored = node.get("widgets_values")
    if isinstance(stored, dict):
        # a pack's own page keeps names
        return list(_made(known, None, stored))
    values = _migrated(known, list(stored or ()))
    made = list(_made(known, values))
    if values:
        _refuse_unknown(known, node)
    return made


def with_values(definition: dict[str, Any], given: dict[str, Any]) -> list[Widget]:
    """The widgets of a node with the values that stand in a prompt."""
    return list(_made(inputs(definition), None, given))


def sub_widgets(option: dict[str, Any], name: str) -> list[Widget]:
    """The widgets, as they are at first, that belong to an option of the dynamic combo `name`."""
    return list(_made(_option_inputs(option, name), None))


def sent(value: Any, kind: str) -> Any:
    """A value as it stands in a prompt, where a bare list is a link."""
    if not isinstance(value, list):
        return value
    return {"__type__": "CURVE", "__value__": value} if kind == "CURVE" else {"__value__": value}


def choices(options: dict[str, Any]) -> list[Any]:
    """What may be chosen in a COMBO or a dynamic combo."""
    listed = options.get("options") or []
    return [one["key"] if isinstance(one, dict) else one for one in listed]


def prompt_text(text: str, draw: random.Random) -> str:
    """A text with one of each {a|b} chosen and comments left out, as the page sends it.

    A text with more than 200 of them stays as it is: each may hold the rest of them.
    """
    return text if text.count("{") > _MOST_CHOICES else _chosen(text, draw)


def _chosen(text: str, draw: random.Random) -> str:
    text = _COMMENTS.sub("", text)
    out, at = [], 0
    while at < len(text):
        letter = text[at]
        at += 1
        if letter == "\\":
            out.append(text[at - 1 : at + 1])
            at += 1
        elif letter == "{":
            found, at = _alternatives(text, at)
            out.append(_chosen(draw.choice(found), draw))
        else:
            out.append(letter)
    return _ESCAPED.sub(r"\1", "".join(out))


_BUTTONS = ("IMAGEUPLOAD", "AUDIOUPLOAD", "AUDIO_UI")


def _input(name: str, spec: Any) -> Input:
    kind, *rest = spec if isinstance(spec, list | tuple) and spec else ["*"]
    options = dict(rest[0]) if rest and isinstance(rest[0], dict) else {}
    if isinstance(kind, list | tuple):
        kind, options = "COMBO", {**options, "options": list(kind)}
    return Input(name, str(options.get("widgetType") or kind), options)


def _first(known: dict[str, Input], flags: tuple[str, ...]) -> str | None:
    for name, one in known.items():
        if one.kind == "COMBO" and any(one.options.get(flag) is True for flag in flags):
            return name
    return None


def _grows_widgets(one: Input) -> bool:
    template = (one.options.get("template") or {}).get("input") or {}
    return any(has_widget(_input(name, spec)) for kind in ("required", "optional")
               for name, spec in (template.get(kind) or {}).items())  # fmt: skip


def _option_inputs(option: dict[str, Any], name: str) -> list[Input]:
    known = option.get("inputs") or {}
    return [_input(f"{name}.{sub}", spec) for kind in ("required", "optional")
            for sub, spec in (known.get(kind) or {}).items()]  # fmt: skip


def _made(
    known: list[Input], values: list[Any] | None, named: dict[str, Any] | None = None
) -> Iterator[Widget]:
    """The widgets of inputs.

    Args:
        values: taken from its front, while it lasts.
        named: values by name, instead.
    """

    def value_of(default: Any) -> Any:
        return values.pop(0) if values else default

    for one in known:
        if not has_widget(one):
            continue
        name, kind, options = one
        if kind in _BUTTONS:
            if kind != "AUDIO_UI":  # which is not even kept
                value_of(None)
                yield Widget(name, kind, options, None, sent=False)
            continue
        value = (named or {}).get(name, value_of(_default(one)))
        if value is None and kind in ("COMBO", DYNAMIC):
            value = next(iter(choices(options)), None)
        yield Widget(name, kind, options, value)
        if kind == DYNAMIC:
            for option in options.get("options") or ():
                if option.get("key") == value:
                    yield from _made(_option_inputs(option, name), values, named)
        control = options.get("control_after_generate")
        if control or (control is None and kind == "INT" and name in _SEEDS):
            yield Widget("control_after_generate", "COMBO", {}, value_of("randomize"), sent=False)
            if kind == "COMBO":
                yield Widget("control_filter_list", "STRING", {}, value_of(""), sent=False)


def _default(one: Input) -> Any:
    default = one.options.get("default")
    if one.kind in ("COMBO", DYNAMIC):
        # a default that is no option is sent, and refused, as it is; "" and 0 are as none
        return (default if one.kind == "COMBO" else None) or next(iter(choices(one.options)), None)
    if default is not None:
        return default
    empty = {"INT": 0, "FLOAT": 0, "BOOLEAN": False, "COLOR": "#000000"}
    return empty.get(one.kind, "")


def _migrated(known: list[Input], values: list[Any]) -> list[Any]:
    """Values without those of inputs that had a widget once and are sockets now."""
    forced: list[bool] = []
    for one in known:
        if has_widget(one) or one.options.get("forceInput"):
            forced.append(bool(one.options.get("forceInput")))
            if one.options.get("control_after_generate"):
                forced.append(False)
    if len(forced) != len(values):
        return values
    return [value for value, old in zip(values, forced, strict=True) if not old]


def _refuse_unknown(known: list[Input], node: dict[str, Any]) -> None:
    """Raises Pages where values are left that a widget of a pack's own page may have."""
    slots = {slot.get("name"): slot for slot in node.get("inputs") or ()}
    for one in known:
        if not has_widget(one) and not one.options.get("forceInput"):
            slot = slots.get(one.name)
            if (slot is None and "inputs" in node) or (slot and slot.get("widget")):
                raise Pages(f"{one.name} ({one.kind})")


def _alternatives(text: str, at: int) -> tuple[list[str], int]:
    """What stands between the bars of a block that begins before `at`, and where it ends."""
    found, start, depth = [], at, 0
    while at < len(text):
        letter = text[at]
        at += 1
        if letter == "\\":
            at += 1
        elif letter == "{":
            depth += 1
        elif letter == "}":
            if not depth:
                return [*found, text[start : at - 1]], at
            depth -= 1
        elif letter == "|" and not depth:
            found.append(text[start : at - 1])
            start = at
    return [*found, text[start:]], len(text)
