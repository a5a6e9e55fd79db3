"""The live frontier: what depends on a live source runs per frame, the rest once."""

import graphlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..host.graph import Graph, behind, links


class GraphError(ValueError):
    """A graph that cannot run live.

    Attributes:
        node: id of the node that is in the way, if it is one.
        allow: what the person at the server would have to allow; see allowed.NotAllowed.
    """

    def __init__(self, message: str, node: str | None = None, allow: Any = None):
        super().__init__(message)
        self.node, self.allow = node, allow


class Kinds(Protocol):
    """What ComfyUI knows of node classes."""

    def is_source(self, node: dict[str, Any]) -> bool: ...

    def is_view(self, node: dict[str, Any]) -> bool:
        """Whether its pictures leave the graph, to pages or to other programs."""

    def sends(self, node: dict[str, Any]) -> bool:
        """Whether a view's pictures go to another program."""

    def is_output(self, node: dict[str, Any]) -> bool: ...

    def keeps(self, node: dict[str, Any]) -> bool:
        """Whether it keeps something, by name, for the frame after."""

    def recalls(self, node: dict[str, Any]) -> bool:
        """Whether it gives what was kept in the frame before."""

    def is_lazy(self, node: dict[str, Any], name: str) -> bool: ...

    def outputs(self, node: dict[str, Any]) -> int: ...


@dataclass(frozen=True)
class Split:
    """A graph, cut.

    Attributes:
        graph: the whole of it.
        sources: ids of the live sources that a view depends on.
        views: ids of the views, in the graph's order.
        sends: those of them whose pictures go to other programs.
        keeps: nodes that run per frame though no view depends on them; see `keepers`.
        live: nodes that run per frame.
        frozen: nodes that run once, and again when an edit reaches them.
        handover: (node id, output index) of the frozen values that the ordinary prompt makes.
        idle: output nodes that do not run while live.
        workflow: what the page shows as this graph, for files that keep it.
    """

    graph: Graph
    sources: list[str]
    views: list[str]
    sends: list[str]
    keeps: list[str]
    live: frozenset[str]
    frozen: frozenset[str]
    handover: list[tuple[str, int]]
    idle: list[str]
    workflow: Any = None


def split(graph: Graph, kinds: Kinds) -> Split:
    """Cut a validated graph at its live frontier.

    Raises:
        GraphError: there is no view, no view depends on a live source, or an input that its class
            does not declare, which ComfyUI does not validate but follows, leads nowhere or back.
    """
    views = [name for name, node in graph.items() if kinds.is_view(node)]
    if not views:
        raise GraphError(
            "There is no Live View or Live Send in the graph. Add one: it shows the frames."
        )
    keeps = keepers(graph, kinds)
    needed = behind(graph, [*views, *keeps])
    sources = [name for name in graph if name in needed and kinds.is_source(graph[name])]
    if not sources:
        raise GraphError(
            "No Live View or Live Send depends on a Live Camera. Add one and connect its image.",
            views[0],
        )
    _followed(graph, needed)
    # what was kept is another thing in each frame, and is kept anew in each
    by_frame = {n for n in needed if kinds.keeps(graph[n]) or kinds.recalls(graph[n])}
    live = _downstream(graph, by_frame.union(sources), needed)
    frozen = needed - live

    def once(node: str, name: str) -> bool:
        # a lazy input may never be asked for; the frame loop makes it when it is
        return node in frozen and not kinds.is_lazy(graph[node], name)

    frontier = [
        target
        for node in live
        for name, target, _ in links(graph[node])
        if target in frozen and not kinds.is_lazy(graph[node], name)
    ]
    given = behind(graph, frontier, once)
    return Split(
        graph=graph,
        sources=sources,
        views=views,
        sends=[name for name in views if kinds.sends(graph[name])],
        keeps=keeps,
        live=frozenset(live),
        frozen=frozenset(frozen),
        handover=[(n, i) for n in graph if n in given for i in range(kinds.outputs(graph[n]))],
        idle=[n for n, node in graph.items() if kinds.is_output(node) and n not in needed],
    )


def keepers(graph: Graph, kinds: Kinds) -> list[str]:
    """What keeps something for the next frame and is behind no view, but whose name a node asks
    for that a view depends on, itself or by way of what is kept. What nobody asks for is idle.
    """
    needed = behind(graph, [name for name, node in graph.items() if kinds.is_view(node)])
    found: list[str] = []
    while True:
        asked = {_kept_as(graph[name]) for name in needed if kinds.recalls(graph[name])}
        more = [
            name
            for name, node in graph.items()
            if name not in needed and kinds.keeps(node) and _asked_for(_kept_as(node), asked)
        ]
        if not more:
            return found
        found += more
        needed |= behind(graph, more)


def _kept_as(node: dict[str, Any]) -> str | None:
    """The name that something is kept under; None if it comes over a link."""
    name = node["inputs"].get("name")
    return name.strip() if isinstance(name, str) else None


def _asked_for(name: str | None, asked: set[str | None]) -> bool:
    return bool(asked) and (name is None or None in asked or name in asked)


def _followed(graph: Graph, needed: set[str]) -> None:
    """Raises GraphError for a link that the executor could not follow to an end."""
    ends: dict[str, list[str]] = {}
    for node in needed:
        for name, target, _ in links(graph[node]):
            if target not in graph:
                raise GraphError(f"{name}: there is no node {target} to take it from.", node)
            ends.setdefault(node, []).append(target)
    try:
        graphlib.TopologicalSorter(ends).prepare()
    except graphlib.CycleError as circle:
        node = circle.args[1][0]
        raise GraphError("It depends on itself. Take one of the links out.", node) from None


def _downstream(graph: Graph, found: set[str], within: set[str]) -> set[str]:
    """These nodes, and those of `within` that depend on them."""
    users: dict[str, list[str]] = {}
    for name in within:
        for _, target, _ in links(graph[name]):
            users.setdefault(target, []).append(name)
    found, todo = set(found), list(found)
    while todo:
        for name in users.get(todo.pop(), ()):
            if name not in found:
                found.add(name)
                todo.append(name)
    return found


def number(inputs: dict[str, Any], name: str, default: int) -> int:
    """A setting of a node; the default for one that is no number, as when it is a link."""
    value = inputs.get(name, default)
    return int(value) if isinstance(value, int | float) else default


def constant(inputs: dict[str, Any], name: str, default: str, node: str) -> str:
    """A word among a node's settings. Raises GraphError if it is a link."""
    value = inputs.get(name, default)
    if not isinstance(value, str):
        raise GraphError(f"{name}: set it on the Live Camera itself while live.", node)
    return value


def unchanged(before: Split, after: Split, among: Callable[[Split], frozenset[str]]) -> set[str]:
    """Nodes that are in both graphs with the same class, settings and dependencies.

    Args:
        among: which nodes of a split are looked at.
    """
    both = set(among(before) & among(after))
    other = {
        name
        for name in both
        if _recipe(before.graph[name]) != _recipe(after.graph[name])
        or any(target not in both for _, target, _ in links(after.graph[name]))
    }
    return both - _downstream(after.graph, other, both)


def _recipe(node: dict[str, Any]) -> tuple:
    return node["class_type"], node["inputs"]
