"""What a house is told: one typed table, the same from `run.py serve` and from a config file.

`serve run serve.app:build workflow=/data/w.json replicas=1:8` and KubeRay's `args` fill it, too.
What only the cluster's machines know (where ComfyUI is, the key) may come from the environment:
LIVEDIFFUSION_COMFYUI, LIVEDIFFUSION_PYTHON, LIVEDIFFUSION_BASE, LIVEDIFFUSION_KEY.
"""

import os
import pathlib
from typing import Any

import pydantic

from .options import LOCAL, MOST_REPLICAS, bounds
from .tickets import decoded
from .workflow import exposed

ENVIRONMENT = {
    "comfyui": "LIVEDIFFUSION_COMFYUI", "python": "LIVEDIFFUSION_PYTHON",
    "base": "LIVEDIFFUSION_BASE", "key": "LIVEDIFFUSION_KEY",
}  # fmt: skip


class Settings(pydantic.BaseModel):
    """The settings of one house.

    Attributes:
        workflow: a workflow as ComfyUI saves it, or the path of its file.
        inputs: NODE.NAME of what visitors may change; empty: what the workflow exposes.
        title: what stands above the page.
        replicas: "auto" (as many as GPUs, from one on), "N" or "MIN:MAX"; MIN may be 0. Of
            `run.py serve` on a machine of its own "auto" is `here`.
        spare: replicas that are kept for who comes next, while anybody is here.
        most: what "auto" scales up to where the cluster may grow; 0: the GPUs that it has now.
        ingresses: processes that visitors' sockets are spread over.
        gpus_each: of a GPU, 1 or a fraction (capacity.py); 0 where Ray counts none.
        cpus_each: of a CPU core, as Ray counts them.
        cpu: run on the CPU.
        fps: frames a second that each stream is to keep, 1 to 60.
        limit_s: seconds that a visitor may have; None for no limit.
        most_waiting: visitors who may wait.
        per_address: visits at a time from one address; not counted from this machine itself.
        direct: whether pages may talk to a replica's own port.
        host: what the replicas' ports listen on; a name of this machine only ("127.0.0.1",
            "localhost") keeps them there, everything else opens them on all of its addresses.
        ports: first and last of the replicas' ports.
        secure: whether visitors come by HTTPS, which this house is behind.
        address_header: the header in which a proxy before this house says who a visitor is
            ("x-forwarded-for"); empty: whoever connects.
        comfyui, python, base: ComfyUI's folder, its Python, its base directory, on every machine.
        home: a folder for what running ComfyUIs need; empty: one in the user's cache.
        options: more options of ComfyUI's own.
        api_nodes: whether ComfyUI has its nodes of paid services; without, it is there sooner.
        key: the house's key, base64url of 16 bytes or more.
        warm_s: seconds in which a replica must have made its first picture.
        drain_s: seconds in which the streams of a replica that is to go must be elsewhere.
        idle_s: seconds that a replica too many is kept.
        to_zero_s: the same of the last one, where MIN is 0; None: idle_s.
        log: the file that sessions' events are appended to, of the machine that the lobby is on;
            empty: the lobby's own output.
        log_most: bytes after which that file begins anew, the one before kept as LOG.1; 0: never.
        log_prompts: whether the log has what visitors write.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    workflow: dict[str, Any]
    inputs: list[str] = []
    title: str = pydantic.Field("", max_length=200)
    replicas: str = "auto"
    spare: int = pydantic.Field(0, ge=0, le=MOST_REPLICAS)
    most: int = pydantic.Field(0, ge=0, le=MOST_REPLICAS)
    ingresses: int = pydantic.Field(2, ge=1, le=1000)
    gpus_each: float = pydantic.Field(1.0, ge=0, le=1)
    cpus_each: float = pydantic.Field(0.1, ge=0, le=1024)
    cpu: bool = False
    fps: float = pydantic.Field(15.0, ge=1, le=60)
    limit_s: float | None = pydantic.Field(None, gt=0)
    most_waiting: int = pydantic.Field(1000, ge=0, le=100_000)
    per_address: int = pydantic.Field(64, ge=1)
    direct: bool = True
    host: str = "127.0.0.1"
    ports: tuple[int, int] = (8301, 8999)
    secure: bool = False
    address_header: str = ""
    comfyui: str = ""
    python: str = ""
    base: str = ""
    home: str = ""
    options: list[str] = []
    api_nodes: bool = False
    key: str = ""
    warm_s: float = pydantic.Field(1800.0, gt=0)
    drain_s: float = pydantic.Field(20.0, gt=0)
    idle_s: float = pydantic.Field(120.0, ge=0)
    to_zero_s: float | None = pydantic.Field(None, ge=0)
    log: str = ""
    log_most: int = pydantic.Field(0, ge=0)
    log_prompts: bool = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_environment(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, variable in ENVIRONMENT.items():
                if not given.get(name) and os.environ.get(variable):
                    given = {**given, name: os.environ[variable]}
        return given

    @pydantic.field_validator("workflow", mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return exposed.read(pathlib.Path(str(given)).expanduser())
        exposed.check(given)
        return given

    @pydantic.field_validator("replicas", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        return str(given) if isinstance(given, int) else given

    @pydantic.field_validator("replicas")
    @classmethod
    def _parsed(cls, given: str) -> str:
        bounds(given, 1)
        return given

    @pydantic.field_validator("ports")
    @classmethod
    def _in_order(cls, given: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= given[0] <= given[1] <= 65535:
            raise ValueError(f"ports are 1 to 65535, the first one first, not {given}")
        return given

    @pydantic.field_validator("key")
    @classmethod
    def _long_enough(cls, given: str) -> str:
        if given and len(decoded(given)) < 16:
            raise ValueError("a house's key is base64url of 16 bytes or more")
        return given

    def bounds(self, gpus: float) -> tuple[int, int]:
        """The fewest and most replicas, where the cluster has so many GPUs now."""
        each = 0 if self.cpu else self.gpus_each
        # one is on one GPU: what is left of two does not make another
        here = max(1, int(gpus) * int(1 / each + 1e-6)) if each else 1
        return bounds(self.replicas, max(here, self.most))

    def here(self, gpus: float) -> str:
        """`replicas` on a machine of one's own with so many GPUs, which cost the same unused:
        "auto" is one for each GPU at once, and where GPUs are shared more as they are needed."""
        if self.replicas != "auto":
            return self.replicas
        _, high = self.bounds(gpus)
        low = min(high, max(1, int(gpus)))
        return f"{low}" if low == high else f"{low}:{high}"

    def local(self) -> bool:
        """Whether replicas' ports are for this machine only."""
        return self.host in LOCAL
