"""Who may talk to a live run: the page of this very server, and nobody behind its back."""

from urllib.parse import urlsplit

from aiohttp import web


def same_origin(request: web.Request) -> None:
    """Let a request of this server's own page, or of a program that is no browser, pass.

    Raises:
        web.HTTPForbidden: another site's page sent it. ComfyUI's own check does not see null
            origins, and looks at loopback addresses only.
    """
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        forbid(
            f"Origin {origin} is not this server ({request.host}). Behind a proxy, have it pass "
            "the Host header on."
        )
    if request.headers.get("Sec-Fetch-Site", "same-origin") in ("cross-site", "same-site"):
        forbid("This request comes from another site.")


def forbid(reason: str) -> None:
    """Raises web.HTTPForbidden with the reason as JSON."""
    text = web.json_response({"error": {"message": reason}}).text
    raise web.HTTPForbidden(text=text, content_type="application/json")
