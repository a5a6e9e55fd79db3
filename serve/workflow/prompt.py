"""A workflow as ComfyUI's page saves it, into the prompt that its page would send.

What app.graphToPrompt does in the page (frontend 1.49.6: executionUtil.ts, ExecutableNodeDTO.ts,
SubgraphNode.ts, proxyWidgetMigration.ts), without a page: values of widgets, links through
reroutes, muted and bypassed nodes, primitives, subgraphs in each other.
"""

from typing import Any, NamedTuple

from . import widgets
from .saved import BYPASSED, INPUTS, MOST_NODES, MUTED, PRIMITIVE, Graph, Loader, Node, Slot
from .widgets import Widget

_MOST_STEPS = 300_000  # from node to node, of all links together
_NAMED = 5  # in a message


class Place(NamedTuple):
    """A value that can be set: what it is, and the inputs of the prompt that take it."""

    widget: Widget
    title: str  # of its node
    kind: str  # of the node that has the widget
    label: str | None
    takers: list[tuple[str, str]]


class Prompt(NamedTuple):
    """A prompt, and what of it can be set.

    Attributes:
        graph: node id -> class_type, inputs, _meta; the ids of nodes in subgraphs are "12:3".
        places: "12:3.text" -> the value.
        aliases: (id of a definition, id of a node in it) -> its ids in the prompt.
    """

    graph: dict[str, dict[str, Any]]
    places: dict[str, Place]
    aliases: dict[tuple[str, str], list[str]]


class _Use(NamedTuple):
    """A node where it stands in the prompt; `host` is the subgraph's node that it is in."""

    id: str
    node: Node
    graph: Graph
    host: "_Use | None"


class _Found(NamedTuple):
    """Where a link comes from: an output of a node, or a value of a subgraph's node."""

    id: str
    slot: int
    widget: Widget | None = None
    node: Node | None = None
    label: str | None = None


def to_prompt(workflow: dict[str, Any], info: dict[str, Any]) -> Prompt:
    """The prompt of a workflow.

    Args:
        workflow: of the form that `workflow.read` checks.
        info: /object_info of the ComfyUI that is to run it.

    Raises:
        ValueError: it cannot be made; one sentence.
    """
    return _Conversion(workflow, info).prompt()


class _Conversion:
    def __init__(self, workflow: dict[str, Any], info: dict[str, Any]):
        self._info = info
        self._steps = 0
        self._uses: dict[str, _Use] = {}
        self._root = Loader(workflow, info).root

    def prompt(self) -> Prompt:
        for node in self._root.nodes.values():
            self._use(node, self._root, None, forced=False)
        self._apply_primitives()
        running = [
            use
            for use in self._uses.values()
            if use.node.runs and not use.node.virtual and use.node.inner is None
        ]
        missing = {use.node.type: None for use in running if use.node.type not in self._info}
        if missing:
            raise ValueError(_missing(list(missing)))
        for use in running:
            if use.node.page is not None:
                raise ValueError(
                    f"Only ComfyUI's page knows the values of node {use.id} ({use.node.title}): "
                    f"{use.node.page}; export the workflow in API format."
                )
        prompt = Prompt({}, {}, {})
        for use in running:
            self._add(use, prompt)
        for entry in prompt.graph.values():
            for name, value in list(entry["inputs"].items()):
                if isinstance(value, list) and value[0] not in prompt.graph:
                    del entry["inputs"][name]
        return prompt

    # where it stands

    def _use(self, node: Node, graph: Graph, host: _Use | None, forced: bool) -> None:
        id = f"{host.id}:{node.id}" if host else node.id
        if len(self._uses) >= MOST_NODES:
            raise ValueError(f"It has more than {MOST_NODES} nodes, those in subgraphs included.")
        use = self._uses[id] = _Use(id, node, graph, host)
        # the page looks at the mode of the outermost only: it mutes what is inside with it
        if node.inner is not None and (node.runs or forced):
            for below in node.inner.nodes.values():
                self._use(below, node.inner, use, forced=True)

    def _apply_primitives(self) -> None:
        """What a primitive has is written into the widgets that it is linked to."""
        graphs = {id(use.graph): use.graph for use in self._uses.values()}
        for graph in graphs.values():
            for number, link in graph.links.items():
                origin, target = graph.nodes.get(link.origin), graph.nodes.get(link.target)
                if origin and target and origin.type == PRIMITIVE and "value" in origin.widgets:
                    value = origin.widgets["value"].value
                    slot = next((one for one in target.slots if one.link == number), None)
                    if slot is not None and slot.widget in target.widgets:
                        widget = target.widgets[slot.widget]
                        target.widgets[slot.widget] = widget._replace(value=value)
                        if not origin.widgets["value"].kind:
                            origin.widgets["value"] = widget._replace(name="value", value=value)

    def _add(self, use: _Use, prompt: Prompt) -> None:
        node = use.node
        if use.host is not None:
            prompt.aliases.setdefault((use.graph.id, node.id), []).append(use.id)
        given: dict[str, Any] = {}
        for name, widget in node.widgets.items():
            given[name] = widgets.sent(widget.value, widget.kind)
            owner, label = f"{use.id}.{name}", None
            for slot in node.slots:
                if slot.widget == name:
                    label = slot.label
                    owner = self._primitive(use, slot) or owner
            place = Place(widget, node.title, node.type, label, [])
            self._taken(prompt, owner, place, use.id, name)
        for at, slot in enumerate(node.slots):
            found = self._resolve(use, at)
            if found is None:
                continue
            key = f"{use.id}.{slot.name}"
            if found.widget is None:
                given[slot.name] = [found.id, found.slot]
                prompt.places.pop(key, None)
            else:
                given[slot.name] = widgets.sent(found.widget.value, found.widget.kind)
                prompt.places.pop(key, None)
                outer = found.node or node
                place = Place(found.widget, outer.title, node.type, found.label, [])
                self._taken(prompt, found.id, place, use.id, slot.name)
        prompt.graph[use.id] = {
            "class_type": node.type, "inputs": given, "_meta": {"title": node.title},
        }  # fmt: skip

    def _taken(self, prompt: Prompt, key: str, place: Place, id: str, name: str) -> None:
        prompt.places.setdefault(key, place).takers.append((id, name))

    def _primitive(self, use: _Use, slot: Slot) -> str | None:
        link = use.graph.links.get(slot.link) if slot.link is not None else None
        origin = use.graph.nodes.get(link.origin) if link else None
        if origin is None or origin.type != PRIMITIVE or "value" not in origin.widgets:
            return None
        return f"{use.id[: -len(use.node.id)]}{origin.id}.value"

    def _resolve(self, use: _Use, at: int) -> _Found | None:
        """Where the slot `at` of a node gets what it takes; None if from nowhere."""
        kind: str | None = None
        incoming, seen = True, set()
        while True:
            self._steps += 1
            if self._steps > _MOST_STEPS:
                raise ValueError("Its links lead through too many reroutes and bypassed nodes.")
            if (use.id, at, incoming) in seen:
                raise ValueError(f"The links at node {use.id} ({use.node.title}) go in a circle.")
            seen.add((use.id, at, incoming))
            node = use.node
            if incoming:
                if at >= len(node.slots):
                    return None
                slot = node.slots[at]
                proxy = use.host.node.proxies.get((node.id, slot.name)) if use.host else None
                if proxy is not None:
                    return _Found(f"{use.host.id}.{proxy.name}", -1, proxy, use.host.node)
                if slot.link is None:
                    value = node.promoted.get(slot.name)
                    if value is None:
                        return None
                    return _Found(f"{use.id}.{slot.name}", -1, value, node, slot.label)
                link = use.graph.links.get(slot.link)
                if link is None:
                    raise ValueError(f"Node {use.id} ({node.title}) has a link that is not there.")
                if use.host is not None and link.origin == INPUTS:
                    use, at, kind = use.host, link.slot, None
                    continue
                origin = use.graph.nodes.get(link.origin)
                if origin is None:
                    raise ValueError(f"Node {use.id} ({node.title}) has a link from nowhere.")
                kind = kind or slot.type
                use = self._uses[f"{use.host.id}:{origin.id}" if use.host else origin.id]
                at, incoming = link.slot, False
                continue
            if node.mode == MUTED:
                return None
            if node.mode == BYPASSED:
                at, kind, incoming = _bypass(node, at, kind or "*"), None, True
                if at < 0:
                    return None
            elif node.inner is not None:
                numbers = node.inner.outputs[at] if at < len(node.inner.outputs) else []
                link = node.inner.links.get(numbers[0]) if numbers else None
                if link is None:
                    return None
                if link.origin == INPUTS:
                    at, incoming = link.slot, True
                    continue
                use = self._uses.get(f"{use.id}:{link.origin}")
                if use is None:
                    return None
                at = link.slot
            elif node.virtual:
                if at >= len(node.slots):
                    return None
                incoming = True
            else:
                return _Found(use.id, at)


def _bypass(node: Node, at: int, kind: str) -> int:
    """The slot whose input a bypassed node gives out at its output `at`; -1 if none."""
    slots = [slot.type for slot in node.slots]
    if kind in ("*", ""):
        return at if at < len(slots) else 0
    given = node.outputs[at] if at < len(node.outputs) else "*"
    if at < len(slots) and _fits(slots[at], given) and _fits(slots[at], kind):
        return at
    if kind in slots:
        return slots.index(kind)
    return next((i for i, one in enumerate(slots) if _fits(one, given) and _fits(one, kind)), -1)


def _fits(a: str, b: str) -> bool:
    if a in ("*", "", "0") or b in ("*", "", "0"):
        return True
    return not set(a.lower().split(",")).isdisjoint(b.lower().split(","))


def _missing(kinds: list[str]) -> str:
    named = ", ".join(kind[:60] for kind in kinds[:_NAMED])
    more = f" and {len(kinds) - _NAMED} more" if len(kinds) > _NAMED else ""
    return (
        f"Nodes are not in this ComfyUI, or in its page only: {named}{more}; install their packs, "
        "or export the workflow in API format."
    )
