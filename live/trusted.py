"""What the person at the server allows, and the prompts that lose their secrets, at the server."""

import asyncio
from typing import Any

from aiohttp import web

from ..trust import addresses, boundary
from ..trust.schema import BadData, shown
from . import wires
from .allowed import ADDRESS, DEVICE
from .concealed import concealed
from .guard import asked, forbid, guarded

# the nodes that have an address, and whether pictures go there
ENDS = {"LiveCamera": False, "LiveSend": True}


def add(server: Any) -> None:
    """Register the route, and the look at every prompt, on ComfyUI's PromptServer."""
    server.add_on_prompt_handler(lambda data: concealed(data, wires.concealed(), ENDS))
    server.routes.route("POST", "/livediffusion/allow")(guarded(_allow))


async def _allow(request: web.Request) -> web.StreamResponse:
    """Allow an address or a device; only for who sits at the server.

    Answers what was added to the list, and the address as the node is to have it from now on.
    """
    data = await asked(request, boundary.ALLOW)
    peer = request.transport.get_extra_info("peername") if request.transport else None
    if not boundary.at_server(request.headers, peer[0] if peer else None):
        forbid(
            "Only ComfyUI's page at the server itself (localhost) may allow this. The person there "
            f"can press Allow, or add it to {wires.allowed().named} in ComfyUI's user folder."
        )
    kind, what = data["kind"], data["what"].strip()
    try:
        answer = await asyncio.to_thread(_address if kind == ADDRESS else _device, what)
    except OSError as reason:
        why = (reason.strerror or str(reason)).rstrip(".")
        raise BadData(
            f"{kind}: it cannot be written down in ComfyUI's user folder: {why}."
        ) from None
    except ValueError as reason:
        raise BadData(str(reason)) from None
    return web.json_response(answer)


def _address(what: str) -> dict[str, Any]:
    address = wires.concealed().read(what)
    if address.ip is not None:
        addresses.reachable(address, [address.host])
    pattern = addresses.as_pattern(address)
    wires.concealed().keep(address)
    wires.allowed().add(ADDRESS, pattern)
    return {"kind": ADDRESS, "allowed": pattern, "address": address.text()}


def _device(what: str) -> dict[str, Any]:
    if not what.isprintable() or what == "*" or len(what) > 256:
        raise BadData(f"device: {shown(what)} is no device's name.")
    wires.allowed().add(DEVICE, what)
    return {"kind": DEVICE, "allowed": what}
