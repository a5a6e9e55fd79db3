"""A saved workflow, its nodes with their widgets and slots as ComfyUI's page would load them.

Subgraphs are loaded once, however often they are used (frontend 1.49.6: LGraph.ts,
litegraphService.ts, SubgraphNode.ts, proxyWidgetMigration.ts).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import widgets
from .widgets import Widget

NOTES = ("Note", "MarkdownNote")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
# of a workflow, its subgraphs counted as often as they are used, with notes, reroutes and what is
# muted; those that are run are fewer (trust/boundary.py)
MOST_NODES = 10_000
INPUTS = "-10"  # a subgraph's own inputs, as its links name their origin
MUTED, BYPASSED = 2, 4
_DEEPEST = 16  # of subgraphs in each other


class Link(NamedTuple):
    origin: str
    slot: int
    target: str


@dataclass
class Slot:
    name: str
    type: str
    link: int | None
    widget: str | None = None
    label: str | None = None


@dataclass
class Node:
    """A node of the root or of a subgraph's definition, which all that use it share."""

    id: str
    type: str
    mode: int
    title: str
    slots: list[Slot]
    outputs: list[str]
    stored: dict[str, Any]
    widgets: dict[str, Widget] = field(default_factory=dict)
    inner: "Graph | None" = None
    # of a subgraph's node: the value for each of its slots that has one, by name
    promoted: dict[str, Widget] = field(default_factory=dict)
    # and for widgets of nodes in it, by node and name: what older pages called proxies
    proxies: dict[tuple[str, str], Widget] = field(default_factory=dict)
    # why only a page can tell its values
    page: str | None = None

    @property
    def runs(self) -> bool:
        return self.mode not in (MUTED, BYPASSED)

    @property
    def virtual(self) -> bool:
        return self.type in (*NOTES, REROUTE, PRIMITIVE)


@dataclass
class Graph:
    id: str
    nodes: dict[str, Node]
    links: dict[int, Link]
    # a definition's own: (name, type, label, the links behind it) of each input, the link to each
    # output
    inputs: list[tuple[str, str, str | None, list[int]]] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)


class Loader:
    """Loads a workflow.

    Attributes:
        root: its graph.

    Raises:
        ValueError: its subgraphs are too deep, or in themselves.
    """

    def __init__(self, workflow: dict[str, Any], info: dict[str, Any]):
        self._info = info
        definitions = (workflow.get("definitions") or {}).get("subgraphs") or []
        self._saved = {str(one["id"]): one for one in definitions}
        self._made: dict[str, Graph] = {}
        self._making: list[str] = []
        self.root = self._graph("", workflow)

    def _graph(self, id: str, saved: dict[str, Any]) -> Graph:
        """A graph and, before it, the definitions that it uses."""
        if len(self._making) > _DEEPEST:
            raise ValueError(f"Its subgraphs are in each other more than {_DEEPEST} deep.")
        self._making.append(id)
        links = dict(map(_link, saved.get("links") or ()))
        graph = Graph(id, {}, links)
        for one in saved.get("inputs") or () if id else ():
            graph.inputs.append((str(one.get("name")), str(one.get("type")), one.get("label"),
                                 list(one.get("linkIds") or ())))  # fmt: skip
        for one in saved.get("outputs") or () if id else ():
            graph.outputs.append(list(one.get("linkIds") or ()))
        for one in saved.get("nodes") or ():
            node = self._node(one)
            graph.nodes[node.id] = node
        for node in graph.nodes.values():
            if node.inner is not None:
                self._promote(node)
        self._making.pop()
        return graph

    def _node(self, saved: dict[str, Any]) -> Node:
        kind, inner = str(saved["type"]), None
        definition = self._info.get(kind)
        if kind in self._saved:
            if kind in self._making:
                raise ValueError("A subgraph of it is in itself.")
            if kind not in self._made:
                self._made[kind] = self._graph(kind, self._saved[kind])
            inner = self._made[kind]
            title = self._saved[kind].get("name")
        else:
            title = definition and (definition.get("display_name") or definition.get("name"))
        node = Node(
            str(saved["id"]), kind, saved.get("mode") or 0,
            str(saved.get("title") or title or kind),
            [Slot(str(one.get("name")), str(one.get("type")), one.get("link"),
                   (one.get("widget") or {}).get("name"), one.get("label"))
             for one in saved.get("inputs") or ()],
            [str(one.get("type")) for one in saved.get("outputs") or ()],
            saved, inner=inner,
        )  # fmt: skip
        if inner is None and definition is not None:
            self._define(node, definition)
        elif kind == PRIMITIVE:
            values = saved.get("widgets_values") or []
            if isinstance(values, list) and values:
                node.widgets["value"] = Widget("value", "", {}, values[0])
        return node

    def _define(self, node: Node, definition: dict[str, Any]) -> None:
        """Widgets and slots of a node as its definition has them."""
        try:
            made = widgets.of_node(node.type, definition, node.stored)
        except widgets.Pages as reason:
            node.page, made = str(reason), []
        for widget in made:
            if widget.sent:
                node.widgets[widget.name] = widget
        known = widgets.inputs(definition)
        saved = {slot.name: slot for slot in node.slots}
        slots = []
        for one in sorted(known, key=widgets.has_widget):
            has = widgets.has_widget(one)
            if (one.kind.startswith("COMFY_") and not has) or one.options.get("socketless"):
                continue  # there as the page saved them
            before = saved.pop(one.name, None)
            slots.append(Slot(
                one.name, one.kind, before.link if before else None,
                one.name if has else None, before.label if before else None,
            ))  # fmt: skip
        slots += [slot for slot in node.slots if slot.name in saved]
        node.slots = [slot for slot in slots
                      if slot.widget is None or slot.widget in node.widgets]  # fmt: skip
        for i, kind in enumerate(definition.get("output") or ()):
            kind = "COMBO" if isinstance(kind, list | tuple) else str(kind)
            if i >= len(node.outputs):
                node.outputs.append(kind)
            elif not kind.startswith("COMFY_"):
                node.outputs[i] = kind

    def _promote(self, node: Node) -> None:
        """Slots of a subgraph's node, and the values that it has for widgets in it."""
        inner = node.inner
        assert inner is not None
        pairs = self._match(node, inner)
        stored = node.stored.get("widgets_values")
        values = stored if isinstance(stored, list) else []
        at = 0
        for slot, links in pairs:
            widget = self._behind(inner, links)
            if widget is not None:
                value = values[at] if at < len(values) else None
                node.promoted[slot.name] = widget.having(value)
                at += 1
        proxies = (node.stored.get("properties") or {}).get("proxyWidgets")
        for i, entry in enumerate(proxies if isinstance(proxies, list) else ()):
            if isinstance(entry, list) and len(entry) >= 2:
                value = values[i] if i < len(values) else None
                self._proxy(node, pairs, str(entry[0]), str(entry[1]), value)

    def _match(self, node: Node, inner: Graph) -> list[tuple[Slot, list[int]]]:
        """The node's slots as its definition has them: by name and type, else by name."""
        left = list(inner.inputs)
        kept = []
        whole = node.slots + [Slot(name, kind, None, None, label)
                              for name, kind, label, _ in left[len(node.slots) :]]  # fmt: skip
        for slot in whole:
            same = next((one for one in left if one[:2] == (slot.name, slot.type)), None)
            same = same or next((one for one in left if one[0] == slot.name), None)
            if same is not None:
                left.remove(same)
                kept.append((slot, same[3]))
        node.slots = [slot for slot, _ in kept]
        outputs = self._saved[inner.id].get("outputs") or ()
        node.outputs = [str(one.get("type")) for one in outputs]
        return kept

    def _behind(self, inner: Graph, links: list[int]) -> Widget | None:
        """The widget that a definition's input stands for: the first that it is linked to."""
        for number in links:
            link = inner.links.get(number)
            target = inner.nodes.get(link.target) if link else None
            for slot in target.slots if target else ():
                if slot.link != number:
                    continue
                if target.inner is not None:
                    deeper = next(
                        (one[3] for one in target.inner.inputs if one[0] == slot.name), []
                    )
                    widget = self._behind(target.inner, deeper)
                else:
                    widget = target.widgets.get(slot.widget or "")
                if widget is not None:
                    return widget
        return None

    def _proxy(
        self, node: Node, pairs: list[tuple[Slot, list[int]]], source: str, name: str, value: Any
    ) -> None:
        """A widget of a node inside that stands on the subgraph's node, as older pages had it."""
        inner = node.inner
        assert inner is not None
        linked = name if source == "-1" else None
        below = inner.nodes.get(source)
        if below is not None:
            at = next((slot.link for slot in below.slots if slot.name == name), None)
            for slot, links in pairs:
                if at is not None and at in links:
                    linked = slot.name
        if linked is not None:
            if linked in node.promoted and value is not None:
                node.promoted[linked] = node.promoted[linked].having(value)
            return
        if below is None:
            return
        found: list[tuple[str, str, Widget | None]] = []
        if below.type == PRIMITIVE:
            own = below.widgets.get("value")
            for number, link in inner.links.items():
                target = inner.nodes.get(link.target) if link.origin == source else None
                for slot in target.slots if target else ():
                    if slot.link == number and slot.widget in target.widgets:
                        widget = target.widgets[slot.widget]
                        given = widget.value if own is None else own.value
                        found.append((target.id, slot.name, widget._replace(value=given)))
        else:
            widget = below.widgets.get(name) or below.promoted.get(name)
            if widget is None:
                key = next((key for key in below.proxies if below.proxies[key].name == name), None)
                widget = below.proxies[key] if key else None
            found.append((source, name, widget))
        taken = {*node.promoted, *(one.name for one in node.proxies.values())}
        free = next(one for one in (name, *(f"{name}_{i}" for i in range(1, MOST_NODES)))
                    if one not in taken)  # fmt: skip
        for target, slot_name, widget in found:
            if widget is not None:
                node.proxies[target, slot_name] = widget._replace(
                    name=free, value=widget.value if value is None else value
                )


def _link(saved: Any) -> tuple[int, Link]:
    if isinstance(saved, dict):
        return saved["id"], Link(
            str(saved["origin_id"]), saved["origin_slot"], str(saved["target_id"])
        )
    return saved[0], Link(str(saved[1]), saved[2], str(saved[3]))
