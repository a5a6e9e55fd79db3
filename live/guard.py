"""Who may talk to a live run, and what a refusal becomes. The rules are in trust/boundary.py."""

import functools
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from comfy.cli_args import args

from ..trust import boundary
from ..trust.schema import BadData, Schema

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guarded(handler: Handler, most: float = math.inf, visited: bool = False) -> Handler:
    """A handler that answers strangers with 403, bad input with 400, and too many with 429.

    Whatever else a handler raises would be a bug: it is logged, and the answer is one sentence.

    Args:
        most: requests that are answered at a time.
        visited: it answers with a page that changes nothing, to which links of others may lead.
    """
    open_now = 0

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal open_now
        if not visited:
            same_origin(request)
        if not all(map(boundary.is_key, request.match_info.values())):
            forbid("This address is not known.")
        if open_now >= most:
            raise web.HTTPTooManyRequests(**told("Too many of these at once. Try again."))
        open_now += 1
        try:
            return await handler(request)
        except BadData as reason:
            raise web.HTTPBadRequest(**told(str(reason))) from None
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:
            logging.exception("LiveDiffusion: %s", request.path)
            raise web.HTTPInternalServerError(**told("A bug; the log has it.")) from None
        finally:
            open_now -= 1

    return answer


def same_origin(request: web.Request) -> None:
    """Let a request of this server's own page, or of a program that is no browser, pass.

    Raises:
        web.HTTPForbidden: another site's page sent it. ComfyUI's own check does not see null
            origins, and looks at loopback addresses only.
    """
    reason = boundary.stranger(request.headers, args.enable_cors_header)
    if reason is not None:
        forbid(reason)


def forbid(reason: str) -> None:
    """Raises web.HTTPForbidden with the reason as JSON."""
    raise web.HTTPForbidden(**told(reason))


async def body(request: web.Request, most: int) -> bytes:
    """Of a request, no more than `most` bytes of it.

    Raises:
        BadData: it is larger, or packed: no browser packs one, aiohttp unpacks what is small to
            what is not, and waits for ever for the rest of one that is cut.
        web.HTTPRequestEntityTooLarge: it is larger than ComfyUI takes (--max-upload-size).
    """
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise BadData("A request must not be packed (Content-Encoding).")
    data, largest = bytearray(), request.client_max_size
    try:
        async for chunk in request.content.iter_any():
            data += chunk
            if len(data) > most:
                raise BadData(f"The request is larger than {most} bytes.")
            if 0 < largest < len(data):
                raise web.HTTPRequestEntityTooLarge(largest, len(data))
    except (web.RequestPayloadError, aiohttp.http.HttpProcessingError) as reason:
        raise BadData(f"The request cannot be read: {reason}.") from None
    return bytes(data)


async def asked(request: web.Request, schema: Schema) -> dict[str, Any]:
    """The body of a request as a schema gives it. Raises BadData."""
    data = await body(request, boundary.REQUEST.bytes)
    return boundary.told(data, "request", boundary.REQUEST, schema)


def told(reason: str) -> dict[str, str]:
    """What aiohttp's exceptions are made from, with the reason as JSON."""
    text = web.json_response({"error": {"message": reason}}).text
    return {"text": text, "content_type": "application/json"}
