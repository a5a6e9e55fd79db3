"""Engines on disk: the engine, and a sidecar that says everything it depends on.

An engine that does not fit runs wrongly or crashes, so nothing is loaded whose sidecar differs from
what is here, and what differs is named.
"""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ...trust import boundary, schema
from ..remembered import Layers
from . import targets

FORMAT = 1
SUFFIX = ".engine"

# what must be the same here as where it was built, and what to call it
MUST_MATCH = {
    "tensorrt": "another TensorRT",
    "exporter": "another version of this pack's exporter",
}
# and for an engine that was built for the one GPU that was there
MUST_MATCH_ALONE = {
    "gpu": "another GPU",
    "capability": "another compute capability",
    "cuda_driver": "another CUDA driver",
}


class Unfit(Exception):
    """The engine cannot be used here; the text says why."""


@dataclass(frozen=True)
class Made:
    """What an engine was made of and for: everything it depends on.

    Attributes:
        gpu, capability, cuda_driver: of the machine; empty where it is for several, see targets.
        tensorrt: version of the library.
        exporter: version of onnx_export.
        opset: of the ONNX file.
        precision: fp32, fp16 or bf16.
        model: fingerprint of the MODEL, with its LoRAs and their strengths.
        inputs: names, ControlNet residuals included.
        profile: min, opt and max shape of each input.
        flags: of the build, such as "refit".
        library: "tensorrt" or "tensorrt-rtx".
        targets: compute capabilities that it runs on, such as "8.9"; TensorRT for RTX only.
        layers: where frames help each other, or None.
        frames: that these remember.
        depth: what every row runs where rows go on with kept features, or None.
    """

    gpu: str
    capability: str
    cuda_driver: int
    tensorrt: str
    exporter: int
    opset: int
    precision: str
    model: str
    inputs: tuple[str, ...]
    profile: dict[str, tuple[tuple[int, ...], ...]]
    flags: tuple[str, ...] = ()
    library: str = "tensorrt"
    targets: tuple[str, ...] = ()
    layers: Layers | None = None
    frames: int = 1
    depth: int | None = None

    def key(self) -> str:
        """The same for the same engine, short; for TensorRT as before there were two libraries, and
        without what it has not."""
        told = asdict(self)
        if self.layers is None:
            del told["layers"], told["frames"]
        if self.depth is None:
            del told["depth"]
        if not self.targets:
            del told["library"], told["targets"]
        text = json.dumps(_plain(told), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class Sidecar:
    """What stands in the JSON file beside an engine.

    Attributes:
        made: see Made.
        family: what a MODEL is made of that has no weights (host.skeleton).
        weights: names in the engine of exchangeable weights: (parameter, transposed).
        built: seconds and date, for people.
        size, digest: of the engine file.
    """

    made: Made
    family: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, tuple[str, bool]] = field(default_factory=dict)
    built: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    digest: str = ""


def beside(engine: pathlib.Path) -> pathlib.Path:
    """The sidecar of an engine."""
    return engine.with_name(f"{engine.name}.json")


def save(sidecar: Sidecar, engine: pathlib.Path) -> None:
    """Write the sidecar of an engine that is there: from then on it counts."""
    sidecar.size, sidecar.digest = engine.stat().st_size, digest(engine)
    text = json.dumps({"format": FORMAT, **_plain(asdict(sidecar))}, indent=1)
    write(beside(engine), text.encode())


def read(engine: pathlib.Path) -> Sidecar:
    """The sidecar of an engine.

    Raises:
        Unfit: there is none, or it is not ours.
    """
    try:
        data = boundary.contents(beside(engine), boundary.SIDECAR.bytes)
        told = schema.parsed(data, "it", boundary.SIDECAR)
        if isinstance(told, dict) and told.get("format", FORMAT) != FORMAT:
            raise Unfit("was built by another version of this pack")
        told = boundary.ENGINE(told, "it")
        del told["format"]
        made = told.pop("made")
        if made.get("layers") is not None:
            made["layers"] = Layers(**made["layers"])
        made = Made(**made)
        if (made.library == "tensorrt-rtx") != bool(made.targets):
            raise Unfit(f"has a JSON file beside it in which {made.library} and targets disagree")
        return Sidecar(made=made, **told)
    except FileNotFoundError as error:
        raise Unfit("has no JSON file beside it, so nobody knows what it was built for") from error
    except (OSError, schema.BadData) as error:
        raise Unfit(f"has a JSON file beside it that cannot be read ({error})") from error


def whole(engine: pathlib.Path) -> Sidecar:
    """The sidecar of an engine that is as it was built.

    Raises:
        Unfit: naming what differs.
    """
    sidecar = read(engine)
    try:
        size = engine.stat().st_size
        if size != sidecar.size:
            raise Unfit(f"is damaged: {size} bytes instead of {sidecar.size}")
        if digest(engine) != sidecar.digest:
            raise Unfit("is damaged: its content has changed since it was built")
    except OSError as error:
        raise Unfit(f"cannot be read ({error})") from error
    return sidecar


def check(engine: pathlib.Path, here: Callable[[str], dict[str, Any]]) -> Sidecar:
    """The sidecar of an engine that fits here and is whole.

    Args:
        here: for the name of a library gpu, capability, cuda_driver and exporter, and as "tensorrt"
            the library's version, None where it is not installed.

    Raises:
        Unfit: naming what differs.
    """
    made = read(engine).made
    facts = here(made.library)
    if facts["tensorrt"] is None:
        raise Unfit(f"was built with {made.library}, which is not installed here")
    for name, what in {**({} if made.targets else MUST_MATCH_ALONE), **MUST_MATCH}.items():
        there = getattr(made, name)
        if there != facts[name]:
            raise Unfit(f"was built for {what}: {there}, and here is {facts[name]}")
    if made.targets and facts["capability"] not in made.targets:
        raise Unfit(
            f"was built for other GPUs: {targets.named(made.targets)}, and here is "
            f"{facts['gpu']} ({facts['capability']})"
        )
    return whole(engine)


def runtime_cache(engine: pathlib.Path, gpu: str) -> pathlib.Path:
    """Where what was compiled for an engine on a GPU is kept."""
    return engine.with_name(f"{engine.name}.{slug(gpu)[:60]}.runtime")


def listed(folders: list[str]) -> dict[str, pathlib.Path]:
    """Engines by name, the newest first; half-written ones have no sidecar and are left out."""
    found = []
    for folder in map(pathlib.Path, folders):
        with contextlib.suppress(OSError):  # it may go while it is looked at
            for path in folder.glob(f"*{SUFFIX}"):
                if path.is_file() and beside(path).is_file():
                    found.append((-path.stat().st_mtime, path.name, path))
    return {name: path for _, name, path in sorted(found)}


def seen(folders: list[str]) -> str:
    """What lies there now; another text once an engine or its sidecar has come, gone or changed."""
    found = []
    for folder in map(pathlib.Path, folders):
        for path in (*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}.json")):
            with contextlib.suppress(OSError):
                about = path.lstat()
                found.append((path.name, about.st_mtime_ns, about.st_size, about.st_mode))
    return str(sorted(found))


def slug(text: str) -> str:
    """For a part of a file's name."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-").lower()


def write(path: pathlib.Path, data: Any) -> None:
    """A file's bytes, all of them or none."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hashed.update(chunk)
    return hashed.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
