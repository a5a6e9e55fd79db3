"""The operator's page: the house on one plain page, and the orders that its buttons give."""

import html
import json
import urllib.parse
from typing import Any


def from_form(data: bytes) -> dict[str, Any]:
    """An order of the operator's page.

    Raises:
        ValueError: it is none.
    """
    fields = dict(urllib.parse.parse_qsl(data.decode(), max_num_fields=4))
    if "replicas" in fields:
        asked = fields["replicas"]
        if asked and not asked.isdecimal():
            raise ValueError("The number of replicas is 0 to 10000, or empty for as needed.")
        return {"replicas": int(asked) if asked else None}
    return fields


def operators_page(state: dict[str, Any] | None) -> str:
    """The house on one plain page."""
    if state is None:
        body = "<p>The lobby does not answer. Reload in a moment.</p>"
    else:
        rows = []
        for name, said in sorted(state["replica"].items()):
            known = html.escape(name)
            streams = " ".join(
                f"{html.escape(v)} ({one.get('fps') or 0:.1f} fps) {_button('end', v)}"
                for v, one in said["streams"].items()
            )
            how = "draining" if said["draining"] else "ready" if said["ready"] else "warming"
            if said.get("failed"):
                how += f": {html.escape(said['failed'])}"
            rows.append(
                f"<tr><td><a href='/relay/{known}/'>{known}</a><td>{how}"
                f"<td>{1e3 * (said.get('tick_s') or 0):.0f} ms<td>{streams or '-'}"
                f"<td>{said.get('restarts', 0)}<td>{_button('drain', name)}"
            )
        problems = "".join(
            f"<li>{html.escape(json.dumps(one, default=str))}" for one in state["problems"][-20:]
        )
        asked = "" if state["asked"] is None else state["asked"]
        body = (
            f"<p>{state['streams']} running, {state['waiting']} waiting, {state['slots']} free, "
            f"{state['replicas']} replicas, {state['draining']} draining.</p>"
            "<table><tr><th>ComfyUI<th>is<th>tick<th>streams<th>restarts<th></tr>"
            f"{''.join(rows)}</table>"
            "<form method=post action=/operator/order>replicas "
            f"<input name=replicas value='{asked}' placeholder='as needed' size=9>"
            f"<button>Set</button></form><ul>{problems}</ul>"
        )
    return (
        "<!doctype html><meta charset=utf-8><title>LiveDiffusion: house</title>"
        "<style>body{font:14px system-ui;margin:2em}td,th{padding:2px 12px 2px 0;text-align:left}"
        f"form{{display:inline}}</style><h1>House</h1>{body}"
    )


def _button(order: str, value: str) -> str:
    return (
        f"<form method=post action=/operator/order><input type=hidden name={order} "
        f"value='{html.escape(value, quote=True)}'><button>{order}</button></form>"
    )
