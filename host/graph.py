"""Reading a graph in ComfyUI's API format: {id: {"class_type": ..., "inputs": {...}}}."""

from collections.abc import Callable, Iterator
from typing import Any

Graph = dict[str, dict[str, Any]]


def link(value: Any) -> tuple[str, int] | None:
    """(node id, output index) if an input's value is a link, as ComfyUI tells them."""
    if not (isinstance(value, list) and len(value) == 2):
        return None
    node, output = value
    if not (isinstance(node, str) and isinstance(output, int | float)):
        return None
    return node, int(output)


def links(node: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(input, node id, output index) of every linked input."""
    for name, value in node["inputs"].items():
        if found := link(value):
            yield name, *found


def behind(
    graph: Graph, nodes: list[str], follow: Callable[[str, str], bool] = lambda node, name: True
) -> set[str]:
    """These nodes and everything that they depend on.

    Args:
        follow: whether to go through an input (node id, input name).
    """
    found: set[str] = set()
    todo = [node for node in nodes if node in graph]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [n for name, n, _ in links(graph[node]) if n in graph and follow(node, name)]
    return found
