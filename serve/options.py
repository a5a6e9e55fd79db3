"""The options of `run.py serve`. Standard library only: they are read before anything is set up."""

import argparse
import pathlib
import re
from typing import Any

from .workflow import exposed
from .workflow.saved import MOST_NODES

PORT = 8000
LOCAL = ("127.0.0.1", "localhost", "::1")  # hosts that are this machine only
_DEEP = 32  # subgraphs in each other that are looked into
_ADDRESS = re.compile(r"auto|local|(?:ray://)?[\w.-]+:\d{1,5}|(?:ray://)?\[[\da-fA-F:]+\]:\d{1,5}")
_KEY = re.compile(r"[\w-]+=*")
MOST_REPLICAS = 10_000
_RANGES = (
    ("port", 0, 65535), ("fps", 1, 60), ("limit", 1, 1e7), ("spare", 0, MOST_REPLICAS),
    ("idle", 0, 1e7), ("drain", 1, 3600), ("waiting", 0, 100_000), ("ingresses", 1, 1000),
    ("metrics_port", 0, 65535), ("per_address", 1, 100_000),
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="run.py serve", description="Many streams behind one address, on Ray Serve.",
        epilog="docs/serve.md tells how a house works, and how to run one on a cluster.",
    )  # fmt: skip
    add = found.add_argument
    add("--plan", action="store_true",
        help="first of all options: how many GPUs are needed, on paper (--plan --help)")
    add("--operator", action="store_true",
        help="first of all options: prints an operator's address (--operator --help)")
    add("workflow", type=pathlib.Path, help="a workflow, as ComfyUI saves it")
    add("--replicas", default="auto", metavar="auto|N|MIN:MAX",
        help="ComfyUIs; auto: one for each GPU, more as needed where GPUs are shared; on a cluster "
        "that is joined as many as needed, from one on; MIN may be 0")
    add("--port", type=int, help=f"default: {PORT}, or a free one where that is taken")
    add("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    add("--fps", type=float, default=15, help="that each stream is to keep (default 15)")
    add("--limit", type=float, metavar="SECONDS", help="that a visitor may have")
    add("--input", action="append", default=[], metavar="NODE.NAME",
        help="that visitors may change, besides those of App mode; may be repeated")
    add("--title", default="", help="above the page")
    add("--base", type=pathlib.Path, metavar="FOLDER",
        help="ComfyUI's base directory, with models and other packs")
    add("--comfyui-option", action="append", default=[], metavar="OPTION", dest="options",
        help="of ComfyUI's own, as --comfyui-option=--fast; may be repeated")
    add("--api-nodes", action="store_true", help="ComfyUI's nodes of paid services, too")
    add("--cpu", action="store_true", help="run on the CPU")
    add("--gpus-each", type=_part, default=1.0, metavar="auto|FRACTION",
        help="of a GPU, for each replica; auto measures one first (default 1)")
    add("--spare", type=int, default=0, metavar="N",
        help="replicas to be free for who comes next, where their number is not fixed")
    add("--idle", type=float, default=120, metavar="SECONDS",
        help="that a replica too many is kept (default 120)")
    add("--drain", type=float, default=20, metavar="SECONDS",
        help="in which streams must have left a replica that is to go (default 20)")
    add("--waiting", type=int, default=1000, metavar="N", help="visitors who may wait")
    add("--per-address", type=int, default=64, metavar="N",
        help="visits at a time from one address, where it is known (default 64)")
    add("--ingresses", type=int, default=2, metavar="N",
        help="processes that visitors' connections are spread over")
    add("--no-direct", "--one-port", "--relay-only", dest="direct", action="store_false",
        help="all goes through the one address, frames too")
    add("--ports", type=_ports, default=(8301, 8999), metavar="FIRST:LAST",
        help="of the replicas' own ports (default 8301:8999)")
    add("--secure", action="store_true", help="a proxy before this takes HTTPS")
    add("--address-header", default="", metavar="NAME",
        help="in which a proxy before this says who a visitor is, as x-forwarded-for")
    add("--proxy", choices=("auto", "haproxy", "serve"), default="auto",
        help="what takes connections: HAProxy where it is installed, or Serve's own")
    add("--metrics-port", type=int, default=0, help="for Prometheus (default: a free one)")
    add("--dashboard", action="store_true", help="Ray's dashboard, for this machine only")
    add("--address", metavar="HOST:PORT",
        help="of a Ray cluster that runs (default: one of its own)")
    add("--key", default="", help="of the house, base64url; LIVEDIFFUSION_KEY keeps it out of "
        "process lists (default: a new one)")
    add("--log", type=pathlib.Path, metavar="FILE", help="for sessions' events, one JSON a line; "
        "appended to (default: one in the cache, whose place is printed)")
    add("--log-prompts", action="store_true", help="also what visitors write")
    # what run.py found
    add("--folder", default="", help=argparse.SUPPRESS)
    add("--python", default="", help=argparse.SUPPRESS)
    add("--check", action="store_true", help=argparse.SUPPRESS)
    return found


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line; ends the process with what is wrong."""
    made = parser()
    found = made.parse_args(arguments)
    try:
        found.workflow_data = exposed.read(found.workflow)
        bounds(found.replicas, 1)
        _looked_at(found)
    except ValueError as reason:
        made.error(str(reason))
    for name, low, high in _RANGES:
        value = getattr(found, name)
        if value is not None and not low <= value <= high:
            made.error(f"--{name.replace('_', '-')} {value:g} is not in {low:g} to {high:g}")
    return found


def _looked_at(found: argparse.Namespace) -> None:
    """What can be told before anything is set up.

    Raises:
        ValueError: it cannot be; in one sentence.
    """
    types = nodes(found.workflow_data)
    if "LiveView" not in types.values():
        raise ValueError("There is no Live View in this workflow: there would be nothing to see.")
    for name in found.input:
        node, dot, _ = name.partition(".")
        if not dot or node not in types:
            known = ", ".join(sorted(types)[:20])
            raise ValueError(f"--input {name} is not NODE.NAME of a node here: {known}.")
    if found.base and not found.base.is_dir():
        raise ValueError(f"--base {found.base} is no folder.")
    if found.log and (found.log.is_dir() or not found.log.absolute().parent.is_dir()):
        raise ValueError(f"--log {found.log} cannot be written: name a file in a folder that is.")
    if found.address and not _ADDRESS.fullmatch(found.address):
        raise ValueError(f"--address {found.address} is not HOST:PORT or auto.")
    if found.key and (len(found.key) < 22 or not _KEY.fullmatch(found.key)):
        raise ValueError("--key is not base64url of 16 bytes or more.")


def nodes(workflow: dict[str, Any]) -> dict[str, str]:
    """The type of each node by its number, `12:3` for node 3 in subgraph 12, of either format."""
    if "nodes" not in workflow:
        return {name: node["class_type"] for name, node in workflow.items()}
    inner = {one["id"]: one.get("nodes") or []
             for one in (workflow.get("definitions") or {}).get("subgraphs") or []}  # fmt: skip
    found: dict[str, str] = {}
    # a subgraph may hold itself, which is refused later
    left = [("", one, 0) for one in workflow["nodes"]]
    while left and len(found) < MOST_NODES:
        before, node, depth = left.pop()
        name = f"{before}{node['id']}"
        found[name] = node["type"]
        if depth < _DEEP:
            left += [(f"{name}:", one, depth + 1) for one in inner.get(node["type"], ())]
    return found


def settings(found: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of `Settings`."""
    title = found.title or found.workflow.stem.replace("_", " ")
    made = {
        "workflow": found.workflow_data, "inputs": found.input, "title": title,
        "replicas": found.replicas, "spare": found.spare, "ingresses": found.ingresses,
        "per_address": found.per_address,
        "gpus_each": 1.0 if found.gpus_each is None else found.gpus_each, "cpu": found.cpu,
        "api_nodes": found.api_nodes,
        "fps": found.fps, "limit_s": found.limit, "most_waiting": found.waiting,
        "direct": found.direct, "host": found.host, "ports": found.ports,
        "secure": found.secure, "address_header": found.address_header,
        "comfyui": found.folder, "python": found.python,
        "base": str(found.base.resolve()) if found.base else "", "options": found.options,
        "key": found.key, "drain_s": found.drain, "idle_s": found.idle,
        "log": str(found.log.resolve()) if found.log else "", "log_prompts": found.log_prompts,
    }  # fmt: skip
    # what is empty may come from the environment
    return {name: value for name, value in made.items() if value != ""}


def bounds(replicas: str, here: int) -> tuple[int, int]:
    """The fewest and the most of "auto", "N" or "MIN:MAX".

    Raises:
        ValueError: it is none of these.
    """
    if replicas == "auto":
        return 1, here
    low, colon, high = replicas.partition(":")
    if not (low.isdecimal() and (high.isdecimal() if colon else True)):
        raise ValueError(f'"{replicas}" is no number of replicas: auto, N or MIN:MAX')
    least, most = int(low), int(high) if colon else int(low)
    if not 0 <= least <= most or not 1 <= most <= MOST_REPLICAS:
        raise ValueError(
            f'"{replicas}" is no number of replicas: 1 to {MOST_REPLICAS}, the smaller one first'
        )
    return least, most


def _part(text: str) -> float | None:
    """Of a GPU; None is to be measured."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no part of a GPU: auto, or 0 to 1")
    return value


def _ports(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} are no ports: FIRST:LAST")
    if not 1 <= int(first) <= int(last or first) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} are no ports: FIRST:LAST, from 1 to 65535")
    return int(first), int(last or first)
