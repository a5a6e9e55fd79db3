"""What TensorRT for RTX does when an engine runs: its kernels are compiled then, and kept.

An engine of it holds no kernels for one GPU. They are compiled when it is loaded and first run,
so what was compiled lies in a file beside the engine, one for each kind of GPU, and is taken from
there the next time.
"""

import hashlib
import logging
import pathlib
import weakref
from typing import Any

from ...trust import boundary, schema
from . import api, files

_DIGEST = hashlib.sha256().digest_size


def context(library: api.Library, engine: Any, cache: "Cache | None") -> Any:
    """An execution context of an engine, None where there is not enough memory.

    CUDA graphs are TensorRT's own here: the tick around an engine is not recorded, buffers keep
    their addresses, and it alone knows when the kernels for a shape are all there. Kernels for a
    shape that an engine with dynamic_size has not met are compiled beside the run (LAZY), which
    goes on with general ones: a live picture does not wait for a compiler.
    """
    if cache is None:
        return engine.create_execution_context()
    trt = library.module
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    strategy = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategy.LAZY
    cache.begin(config)
    return engine.create_execution_context(config)


class Cache:
    """What was compiled for an engine on this GPU, in memory and in its file.

    The file is the SHA-256 of its content, then the content, which TensorRT checks once more: it
    takes nothing that another version, driver or GPU has compiled.

    Args:
        owner: when it goes, what is new is written, and at the latest when Python ends.
        path: of the file.
    """

    def __init__(self, owner: Any, path: pathlib.Path):
        self.path = path
        self._kept: Any = None
        self._config: Any = None
        self._known = b""  # digest of what the file holds
        self._end = weakref.finalize(owner, self.save)

    def begin(self, config: Any) -> None:
        """Hand what the file holds to an engine that is about to be loaded."""
        self._config, kept = config, config.create_runtime_cache()
        if kept is None:
            return
        content = self._read()
        if content and not kept.deserialize(content):
            logging.info("LiveDiffusion: %s is of another GPU, driver or version", self.path.name)
            self._known = b""
        self._kept = kept if config.set_runtime_cache(kept) else None

    def _read(self) -> bytes:
        try:
            data = boundary.contents(self.path, boundary.RUNTIME_CACHE + _DIGEST)
        except FileNotFoundError:
            return b""
        except (OSError, schema.BadData) as error:
            logging.warning("LiveDiffusion: %s is not used (%s)", self.path.name, error)
            return b""
        self._known, content = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(content).digest() != self._known:
            logging.warning(
                "LiveDiffusion: %s is damaged: its kernels are compiled anew", self.path.name
            )
            self._known, content = b"", b""
        return content

    def save(self) -> None:
        """Write what is new. Never raises: a picture is not lost for it."""
        if self._kept is None:
            return
        try:
            content = bytes(self._kept.serialize())
            known = hashlib.sha256(content).digest()
            if not content or known == self._known:
                return
            if len(content) > boundary.RUNTIME_CACHE:
                logging.warning("LiveDiffusion: what was compiled is too large to be kept")
                return
            files.write(self.path, known + content)
            self._known = known
        except Exception as error:  # the bindings' own, a full disk, a folder that is read only
            logging.warning("LiveDiffusion: %s was not written (%s)", self.path.name, error)

    def end(self) -> None:
        """Write what is new, and let go."""
        self._end()
        self._kept = self._config = None
