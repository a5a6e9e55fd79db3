"""Engines that are made, at once or in a thread beside the stream."""

import contextlib
import sys
import threading

import torch

from ...compiled.engine import Engine, Shapes, UNet

# Python hands on between threads this often (seconds) while one of them compiles: with its usual
# 5 ms, each of a UNet's hundreds of operations might wait that long for its turn
_TURN = 1e-4


class Making:
    """An engine, and the way it is made.

    Attributes:
        key: what it is for, as the caller has it.
        shapes: what it is for, as people have it.
        engine: it, prepared once `done` without an error.
        done: it is made, or has failed.
        error: how it failed, or None.
        epoch: the caller's, when it was begun.
    """

    def __init__(self, key: tuple, shapes: Shapes, engine: Engine, unet: UNet, epoch: int = 0):
        self.key, self.shapes, self.engine, self.epoch = key, shapes, engine, epoch
        self.error: Exception | None = None
        self.done = False
        self._unet: UNet | None = unet

    def now(self) -> None:
        """Make it here."""
        self._prepare()
        self.done = True

    def _prepare(self) -> None:
        try:
            self.engine.prepare(self._unet, self.shapes)
        except Exception as error:
            self.error = error
        self._unet = None  # the model is not ours to keep

    def start(self) -> None:
        """Make it in a thread of its own, under the caller's modes of torch."""
        inference, grads = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        device = torch.device(self.shapes.device)

        def beside() -> None:
            with contextlib.ExitStack() as inside:
                inside.enter_context(_turns())
                inside.enter_context(torch.set_grad_enabled(grads))
                inside.enter_context(torch.inference_mode(inference))
                if device.type == "cuda":
                    inside.enter_context(torch.cuda.device(device))
                self._prepare()
            self.done = True

        threading.Thread(target=beside, name="livediffusion-compile", daemon=True).start()


_turning = threading.Lock()
_threads: list[float] = []  # the interval of before, once for each thread that compiles


@contextlib.contextmanager
def _turns():
    """Threads take turns quickly."""
    with _turning:
        _threads.append(sys.getswitchinterval() if not _threads else _threads[0])
        sys.setswitchinterval(_TURN)
    try:
        yield
    finally:
        with _turning:
            before = _threads.pop()
            if not _threads:
                sys.setswitchinterval(before)
