"""The house as an application of Ray Serve.

`run.py serve` builds it here, and so do `serve run serve.app:build workflow=/data/w.json` and a
config file (KubeRay): `import_path: serve.app:build`, `args:` of `Settings`. Wherever it runs, the
repository's root is on PYTHONPATH and ray[serve] installed; ComfyUI has a Python of its own.
"""

import asyncio
import contextlib
import logging
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from . import logs, metrics
from .bounded import Bounded
from .ingress.ingress import Ingress
from .lobby import Lobby
from .replica import Replica
from .settings import Settings
from .tickets import new_key

NAME = "livediffusion"
LOBBY, REPLICA, INGRESS = "Lobby", "Replica", "Ingress"
MOST_CALLS = 64  # for first replicas at a time
_SOON = {
    "health_check_period_s": 1, "health_check_timeout_s": 5,
    # one line for each call otherwise, several a second
    "logging_config": {"log_level": "WARNING", "enable_access_log": False},
}  # fmt: skip


class HouseLobby(Lobby):
    """The lobby as a deployment: its methods as Serve calls them, in one event loop."""

    async def __init__(self, settings: Settings):
        write = logs.to_file(settings.log) if settings.log else None
        if write and settings.log_most:
            write = Bounded(settings.log, settings.log_most, write)
        log = logs.Log(write, settings.log_prompts)
        super().__init__(settings, log, metrics.OfHouse(), self._call)
        self._waking: set[asyncio.Task] = set()

    async def sync(self, *said: Any) -> dict[str, Any]:
        return super().sync(*said)

    async def report(self, said: dict[str, Any]) -> dict[str, Any]:
        return super().report(said)

    async def lost(self, name: str) -> None:
        super().lost(name)

    async def state(self) -> dict[str, Any]:
        return super().state()

    async def order(self, order: dict[str, Any]) -> str:
        return super().order(order)

    async def close(self) -> None:
        super().close()

    def _call(self, waiting: int) -> None:
        """Requests at the replicas' handle, as many as wait: Serve starts the first replica for one
        of them, and the policy (scaling.py) sees how many there are."""
        while len(self._waking) < min(waiting, MOST_CALLS):
            task = asyncio.ensure_future(self._woken_up())
            self._waking.add(task)
            task.add_done_callback(self._waking.discard)

    async def _woken_up(self) -> None:
        handle = serve.get_deployment_handle(REPLICA, serve.get_replica_context().app_name)
        with contextlib.suppress(Exception):  # asked again while anybody waits
            await handle.wake.remote()


def build(settings: Settings) -> Application:
    """The application; without a key in `settings`, tickets are good until the next build only."""
    import base64

    import ray

    if not settings.key:
        key = base64.urlsafe_b64encode(new_key()).decode()
        settings = settings.model_copy(update={"key": key})
        logging.getLogger("ray.serve").warning(
            "LIVEDIFFUSION_KEY is not set: nobody can make an operator's address of this house."
        )
    gpus = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else 0.0
    low, high = settings.bounds(gpus)
    # it takes orders for as many replicas as there can be, which "auto" does not say
    lobby = serve.deployment(HouseLobby).options(
        name=LOBBY, num_replicas=1, max_ongoing_requests=1000,
        graceful_shutdown_wait_loop_s=0.2, graceful_shutdown_timeout_s=2,
        ray_actor_options={"num_cpus": 0}, **_SOON,
    ).bind(settings.model_copy(update={"replicas": f"{low}:{high}"}))  # fmt: skip
    each = 0.0 if settings.cpu else settings.gpus_each
    replica = serve.deployment(Replica).options(
        name=REPLICA, max_ongoing_requests=100, **_number(settings, low, high),
        graceful_shutdown_wait_loop_s=0.2, graceful_shutdown_timeout_s=settings.drain_s + 10,
        ray_actor_options={"num_cpus": settings.cpus_each, "num_gpus": each}, **_SOON,
    ).bind(settings, lobby)  # fmt: skip
    # the replicas are bound to the ingress so that they are of this application
    return serve.deployment(serve.ingress()(Front)).options(
        name=INGRESS, num_replicas=settings.ingresses, max_ongoing_requests=100_000,
        graceful_shutdown_wait_loop_s=0.2, graceful_shutdown_timeout_s=2,
        ray_actor_options={"num_cpus": 0}, **_SOON,
    ).bind(settings, lobby, replica)  # fmt: skip


class Front(Ingress):
    """The ingress as a deployment."""

    async def __init__(self, settings: Settings, lobby: Any, replica: Any):
        await super().__init__(settings, lobby)


def _number(settings: Settings, low: int, high: int) -> dict[str, Any]:
    """How many replicas, as Serve is told."""
    if low == high:
        return {"num_replicas": low}
    return {"autoscaling_config": AutoscalingConfig(
        min_replicas=low, max_replicas=high, initial_replicas=low, upscale_delay_s=0,
        downscale_delay_s=0, downscale_to_zero_delay_s=0, look_back_period_s=12.0,
        policy=AutoscalingPolicy(policy_function="serve.scaling:Policy", policy_kwargs={
            "spare": settings.spare, "idle_s": settings.idle_s, "to_zero_s": settings.to_zero_s,
        }),
    )}  # fmt: skip
