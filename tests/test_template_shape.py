"""The templates against the frontend's own schema of a workflow, as far as they use it.

The schema is in ComfyUI_frontend, src/platform/workflow/validation/schemas/workflowSchema.ts, the
same in 1.49.6 and 1.58.1. tests/browser/test_templates.py has the frontend itself look at them.
"""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEMPLATES = sorted((ROOT / "workflows").glob("*.json"))
UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", re.I)
REPOSITORY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
VERSION = re.compile(r"v?\d+\.\d+\.\d+([-+].+)?|[0-9a-f]{4,40}|unknown", re.I)


def number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def text(value):
    return isinstance(value, str)


def boolean(value):
    return isinstance(value, bool)


def anything(value):
    return True


def either(*kinds):
    return lambda value: any(kind(value) for kind in kinds)


def null(value):
    return value is None


def each(kind):
    return lambda value: isinstance(value, list) and all(map(kind, value))


def numbers(count):
    return lambda value: each(number)(value) and len(value) == count


def matching(pattern):
    return lambda value: text(value) and bool(pattern.fullmatch(value))


def record(needed, optional=()):
    """An object; what else it has is free, as in the schema."""
    optional = dict(optional)

    def check(value):
        return (
            isinstance(value, dict)
            and needed.keys() <= value.keys()
            and all(kind(value[k]) for k, kind in {**needed, **optional}.items() if k in value)
        )

    return check


name = either(whole, text)  # of a node or a slot
slot = either(whole, matching(re.compile(r"\s*[-+]?\d.*")))
kind = either(text, each(text), number)
model = record({"name": text, "url": text, "directory": text})
given = record({"name": text, "type": kind}, {"link": either(number, null), "slot_index": slot})
made = record({"name": text, "type": kind},
              {"links": either(each(number), null), "slot_index": slot})  # fmt: skip
flags = record({}, dict.fromkeys(
    ("collapsed", "pinned", "allow_interaction", "horizontal", "skip_repeated_outputs"), boolean
))  # fmt: skip
properties = record({}, {
    "Node name for S&R": text, "cnr_id": matching(REPOSITORY), "ver": matching(VERSION),
    "aux_id": matching(re.compile(r"[^/]+/[^/]+")), "models": each(model),
})  # fmt: skip
node = record(
    {"id": name, "type": text, "pos": numbers(2), "size": numbers(2), "flags": flags,
     "order": number, "mode": number, "properties": properties},
    {"inputs": each(given), "outputs": each(made), "color": text, "bgcolor": text,
     "widgets_values": either(each(anything), record({}))},
)  # fmt: skip
group = record({"title": text, "bounding": numbers(4)},
               {"id": number, "color": text, "font_size": number, "locked": boolean})  # fmt: skip
extra = record({}, {
    "ds": record({"scale": number, "offset": numbers(2)}), "frontendVersion": text,
    "workflowRendererVersion": lambda value: value in ("LG", "Vue", "Vue-corrected"),
    "linearMode": boolean, "linearData": record({}, {"outputs": each(name)}),
})  # fmt: skip


def link(value):
    kinds = number, name, slot, name, slot, kind
    return each(anything)(value) and len(value) == 6 and all(
        check(part) for check, part in zip(kinds, value, strict=True)
    )  # fmt: skip


PARTS = {
    "id": matching(UUID), "revision": number, "last_node_id": name, "last_link_id": number,
    "nodes": each(node), "links": each(link), "groups": each(group),
    "config": either(record({}), null), "extra": either(extra, null), "version": number,
    "models": each(model),
}  # fmt: skip
NEEDED = {"last_node_id", "last_link_id", "nodes", "links", "version"}


def refused(graph):
    """The parts that the schema refuses, down to the node."""
    found = sorted(NEEDED - graph.keys())
    for part, check in PARTS.items():
        if part in graph and not check(graph[part]):
            bad = [one.get("id") for one in graph["nodes"] if not node(one)]
            found.append((part, bad) if part == "nodes" else part)
    return found


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_what_the_frontend_calls_a_workflow(path):
    assert refused(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda g: g["nodes"][0]["outputs"][0].update(slot_index=None), "nodes"),
        (lambda g: g["nodes"][0]["inputs"][0].update(slot_index=None), "nodes"),
        (lambda g: g["nodes"][0]["inputs"][0].update(link="3"), "nodes"),
        (lambda g: g["nodes"][0].update(size=[1]), "nodes"),
        (lambda g: g["nodes"][0].update(color=None), "nodes"),
        (lambda g: g["nodes"][0]["properties"].update(ver="latest"), "nodes"),
        (lambda g: g["links"].append([1, 2, None, 4, 0, "IMAGE"]), "links"),
        (lambda g: g.update(version="0.4"), "version"),
        (lambda g: g.pop("last_link_id"), "last_link_id"),
    ],
)
def test_what_the_frontend_refuses_is_refused_here(change, part):
    path = next(path for path in TEMPLATES if path.stem == "live_webcam")
    graph = json.loads(path.read_text(encoding="utf-8"))
    # one with inputs and outputs first
    graph["nodes"].sort(key=lambda one: not (one.get("inputs") and one.get("outputs")))
    change(graph)
    assert [p[0] if isinstance(p, tuple) else p for p in refused(graph)] == [part]
