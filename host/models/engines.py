"""An engine on a MODEL: a keyed wrapper that runs the UNet's calls, and falls back loudly.

Weights and their keys stay ComfyUI's, so LoRA, ControlNet and patches go on working: what an engine
cannot do is done by the UNet itself, with a line in the log, on the node and in the live stats.
"""

import contextlib
import logging
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...compiled.engine import (
    Call,
    Engine,
    NotYet,
    Outdated,
    Refused,
    Shapes,
    WeightsAway,
    residuals,
)
from . import coherence, looks, reused
from .compiler import uncompiled
from .looks import COHERENCE, ENGINE, EXCHANGE
from .making import Making
from .remembering import remembered
from .unet import ComfyUNet
from .weights import staying, weights_version

_KEPT = 16  # engines of other shapes that are kept
_PLACED = 4  # of those with memory of their own
_BAKED = 2  # of those with weights of their own
REST = 1.0  # seconds that changed or moved weights must stay before an engine is made anew
# how often the newest calls must have come in a shape before an engine is made for it: a step of a
# sampler asks for a few shapes in turns
_SETTLED, _NEWEST = 3, 8


class Attached:
    """The engine of one MODEL and its clones.

    Args:
        name: of the engine.
        why: it was chosen.
        make: makes one, not prepared yet.
        tell: called with a line for the node whenever what is said there changes.
        alone: there is no UNet to fall back to.
        beside: an engine is made in a thread of its own, and until then the UNet itself runs: for
            one that takes minutes, which no stream should stop for.
        accept: called with the BaseModel and the engine before each call, for an engine that looks
            after its weights itself; raises Refused where it cannot.

    Attributes:
        name: of the engine.
        fell_back: calls that the UNet itself ran because the engine could not.
        ran: calls that the engine ran.
        unsettled: calls that the UNet itself ran in shapes that had not come often enough, or that
            a ring has only while it fills or drains.
        reason: of the newest fallback, or None; where weights were away, until they are back.
        used: when the newest call came (time.monotonic).
        epoch: grows whenever ComfyUI says that it loads or unloads the weights; when it moves them
            it says nothing (host.models.weights).
        inside: True while a graph of the whole tick records or measures: calls pass through.
    """

    def __init__(
        self,
        name: str,
        why: str,
        make: Callable[[], Engine],
        tell: Callable[[str], None] = lambda text: None,
        alone: bool = False,
        accept: Callable[[Any, Engine], None] | None = None,
        beside: bool = False,
    ):
        self.name = name
        self.why = why
        self.alone = alone
        self.ran = 0
        self.fell_back = 0
        self.unsettled = 0
        self.reason: str | None = None
        self.epoch = 0
        self.used = 0.0
        self.inside = False
        self.notes: dict[str, Any] = {}
        self._make = make
        self._accept = accept
        self._beside = beside
        self._making: Making | None = None
        self._template = make()
        self.capturable = self._template.capturable
        self.placed = self._template.placed
        self._tell = tell
        self._note = ""
        self._base = None
        self._engines: OrderedDict[tuple, Engine] = OrderedDict()
        self._broken: OrderedDict[tuple, str] = OrderedDict()
        self._since: OrderedDict[tuple, float] = OrderedDict()  # when it was first called for
        self._newest: deque[tuple] = deque(maxlen=_NEWEST)
        self._passes = False  # the shapes of the calls under way
        self._aside = reused.ALONE  # why their tick is never recorded, where a stream makes them
        self._weights: tuple | None = None  # those that the engines were made on
        self._away: str | None = None  # why no engine can be made on them
        self._rests_until = 0.0
        self._passing = False  # the reason of the newest fallback will not last
        self._said: set[str] = set()
        _attached.add(self)

    def stats(self) -> dict[str, Any]:
        """The choice, what making the engines took, and the fallbacks."""
        return {
            "engine": self.name,
            "why": self.why,
            "calls": self.ran,
            "fallbacks": self.fell_back,
            "unsettled": self.unsettled,
            "reason": self.reason,
            "making": None if self._making is None else str(self._making.shapes),
            "made": [engine.describe() for engine in self._engines.values()],
            **self.notes,
        }

    def line(self) -> str:
        """What the node says."""
        line = f"{self.name}: {self.why}"
        if self._note:
            line += f"; {self._note}"
        if self._making is not None:
            line += f"; compiling for {self._making.shapes}, until then the UNet itself runs"
        return line if self.reason is None else f"{line}; calls ran eager: {self.reason}"

    def note(self, text: str) -> None:
        """What an engine has found out about itself, which the node says from now on."""
        self._note = text
        self._tell(self.line())

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL: learns whose weights are in use."""
        with self.serving(executor.class_obj):
            return executor(*args, **kwargs)

    @contextlib.contextmanager
    def serving(self, model):
        """The calls inside are this BaseModel's."""
        before, self._base = self._base, model
        try:
            yield
        finally:
            self._base = before

    @contextlib.contextmanager
    def passing(self, passes: bool, aside: str = ""):
        """Where True, the shapes of the calls inside will not stay: nothing is made for them;
        `aside` says why their tick is never recorded, where it is not and will not be."""
        before, (self._passes, self._aside) = (self._passes, self._aside), (passes, aside)
        try:
            yield
        finally:
            self._passes, self._aside = before

    def diffusion_model(
        self, executor, x, timesteps=None, context=None, y=None, control=None,
        transformer_options=None, **kwargs,
    ):  # fmt: skip
        """DIFFUSION_MODEL: the call, by the engine or by the UNet itself."""
        options = {} if transformer_options is None else transformer_options
        helping = coherence.among(executor.wrappers[executor.idx + 1 :])
        whole, module = self.name == "cudagraph", executor.class_obj
        helps = helping is not None and helping.acts(options, module)
        if whole and self.inside:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        self.used = time.monotonic()
        key = failure = exchange = memory = reuse = None
        if helps:
            exchange = helping.exchange(options, module, x.shape)
            options = {**options, EXCHANGE: exchange}
        # where frames help each other, the whole tick is recorded or nothing is
        if whole and exchange is not None and helping.changes(exchange):
            if aside := reused.aside(self.name, self._aside, helping, exchange, options, module):
                self.fall_back(aside, passing=True)
            return executor(x, timesteps, context, y, control, options, **kwargs)
        try:
            self._admit(executor, options, kwargs)
            if helps and helping.patchwork is not None:
                raise reused.patching(self.name)
            if exchange is not None:
                remembers = self._template.remembers
                alone = not self._template.mixes
                goes = helping.goes_by_plan(exchange, options, module, alone=alone)
                if goes:
                    reuse = reused.reused(self.name, remembers, exchange, module, x)
                memory = remembered(self.name, remembers, helping, exchange, module, x, goes)
            elif helping is not None and helping.skips is not None:
                raise reused.skipping(self.name)
            given = residuals(control, x.shape[0])
            call = Call(x, timesteps.float(), context, y, given, memory, reuse)
            if self.placed:
                self._follow(module)
            key = self._key(Shapes.of(call), module)
            engine = self._engine(key, Shapes.of(call), module) if self._wanted(key) else None
            if engine is None and self.inside:
                raise Refused("its engine is not there any more")
            if engine is not None:
                if self._accept is not None:
                    self._accept(self._base, engine)
                out = engine(call)
                if memory is not None:
                    memory.tell(exchange)
                if reuse is not None:
                    reused.tell(reuse, exchange, x.dtype)
                self.done()
                return out
            self.unsettled += 1
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            if isinstance(error, Outdated):
                self._engines.pop(key).release()
                if not self._beside:
                    return self.diffusion_model(
                        executor, x, timesteps, context, y, control, options, **kwargs
                    )
            if not isinstance(error, Refused):
                logging.debug("LiveDiffusion: %s failed", self.name, exc_info=True)
                self._gave_up(key, reason_of(error))
            failure = error
        if failure is not None:
            reason = reason_of(failure)
            self.fall_back(reason, isinstance(failure, WeightsAway | NotYet))
            if self.alone:
                raise RuntimeError(f"{self.name}: {reason}")
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def _gave_up(self, key: tuple | None, reason: str) -> None:
        """An engine that has failed is not called again for the same weights and shapes."""
        engine = self._engines.pop(key, None)
        if engine is not None:
            engine.release()
        if not self.alone:  # without a UNet to fall back to, it may as well be tried again
            _remember(self._broken, self._as_loaded(key), reason)
        comfy.model_management.soft_empty_cache()

    def _as_loaded(self, key: tuple | None) -> tuple:
        """What fails while ComfyUI is short of memory may do when it is not, and the other way."""
        return key, getattr(self._base, "model_lowvram", False)

    def done(self) -> None:
        """The engine has run a call, alone or in a recorded tick."""
        self.ran += 1
        if self._passing:
            self.reason, self._passing = None, False
            self._tell(self.line())

    def fall_back(self, reason: str, passing: bool = False) -> None:
        """Say why the UNet itself runs: in the log once, on the node while it lasts.

        Args:
            passing: it is over when the engine runs again.
        """
        self.fell_back += 1
        self._passing = passing
        if reason != self.reason:
            self.reason = reason
            self._tell(self.line())
        if reason not in self._said:
            self._said.add(reason)
            logging.warning("LiveDiffusion: %s", self.line())

    def release(self) -> None:
        """Give the engines back; the next call makes them anew."""
        while self._engines:
            self._engines.popitem()[1].release()

    def loaded(self, *args, **kwargs) -> None:
        """ON_LOAD: the weights' addresses may be others."""
        self._moved()

    def unloaded(self, patcher, unpatch_all: bool = True, *args, **kwargs) -> None:
        """ON_DETACH; ComfyUI also detaches a clone that it is about to load, and means nothing."""
        if unpatch_all:
            self._moved()

    def taken(self, patcher, unpatch_all: bool = True, *args, **kwargs) -> None:
        """ON_DETACH of a MODEL whose memory is the engine's."""
        if unpatch_all:
            self.release()

    def _follow(self, module: torch.nn.Module) -> None:
        """Engines end when the weights move, whether or not ComfyUI has said so.

        Raises:
            WeightsAway: they are where no engine can use them.
        """
        patcher = getattr(self._base, "current_patcher", None)
        if patcher is None:
            raise Refused("the UNet was called outside of ComfyUI's sampling")
        before, now = self._weights, (module, weights_version(patcher))
        if before is None or before[0]() is not module or before[1] != now[1]:
            self._weights, self._away = (weakref.ref(module), now[1]), None
            if before is not None and (before[0]() is not module or before[1].at != now[1].at):
                self.release()
                self._rests_until = time.monotonic() + REST
            else:
                self._touched()
        if self._away is not None:
            raise WeightsAway(self._away)
        if time.monotonic() < self._rests_until:
            self._newest.clear()
            raise WeightsAway("the weights have just moved; it is recorded anew once they stay")

    def _wanted(self, key: tuple) -> bool:
        """False for a shape that will not stay, or has not come often enough for an engine."""
        if not self._template.per_shape or key in self._engines or self.inside:
            return True
        if self._passes:
            return False
        self._newest.append(key)
        return self._newest.count(key) >= _SETTLED

    def _moved(self) -> None:
        self.epoch += 1
        self._touched()

    def _touched(self) -> None:
        for engine in self._engines.values():
            engine.moved()

    def _admit(self, executor, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
        """Refuses what only the UNet itself can do, by name."""
        inner = executor.wrappers[executor.idx + 1 :]
        owners = [(getattr(wrapper, "__self__", None), wrapper) for wrapper in inner]
        others = [
            wrapper for owner, wrapper in owners
            if owner is not self and not isinstance(owner, coherence.Coherence)
        ]  # fmt: skip
        if others:
            raise Refused(f"another node has wrapped the UNet ({looks.named(others[0])})")
        if steers := looks.steering(options):
            raise Refused(f"a node has patched the UNet ({steers})")
        strange = [name for name, value in kwargs.items() if value is not None]
        if strange:
            raise Refused(f"the model takes inputs that the engine does not know: {strange[0]}")
        patcher = getattr(self._base, "current_patcher", None)
        if patcher is not None and (part := looks.replaced_part(patcher)):
            raise Refused(f"a node has replaced a part of the UNet ({part})")
        if getattr(patcher, "current_hooks", None) is not None:
            raise Refused("hooks change the weights while sampling")

    def _key(self, shapes: Shapes, module: torch.nn.Module) -> tuple:
        """What an engine is made for: shapes, the UNet, and its weights where it bakes them."""
        weights = None
        if self._template.bakes and self._accept is None:
            weights = getattr(self._base, "current_weight_patches_uuid", None)
        return self._template.scope(shapes), id(module), weights

    def _engine(self, key: tuple, shapes: Shapes, module: torch.nn.Module) -> Engine | None:
        """The engine for these shapes and the weights that are loaded, made if there is none.

        None while it is made beside.
        """
        known = self._engines.get(key)
        if known is not None:
            self._engines.move_to_end(key)
            return known
        broken = self._broken.get(self._as_loaded(key))
        if broken is not None:
            raise Refused(broken)
        now = time.monotonic()
        first = self._since.get(key, now)
        _remember(self._since, key, first)
        # weights that change all the time, as by a slider of a LoRA, are not baked
        if any(other[:2] == key[:2] for other in self._engines) and now - first < REST:
            raise Refused("the weights have just changed; it is made anew once they stay")
        making = self._making
        if making is None:
            making = Making(key, shapes, self._make(), ComfyUNet(module), self.epoch)
            if not self._beside:
                with uncompiled():
                    making.now()
            elif self.inside or now < self._rests_until:
                return None
            else:
                self._making = making
                making.start()
                self._tell(self.line())
        if not making.done:
            return None
        if self._making is not None:
            self._making = None
            self._tell(self.line())
        self._keep(making)
        return self._engines.get(key)

    def _keep(self, making: Making) -> None:
        """Take what was made, and as much of the others as may be kept with it."""
        error = making.error
        if error is None:
            most = _BAKED if self._template.bakes else _PLACED if self.placed else _KEPT
            while len(self._engines) >= most:
                self._engines.popitem(last=False)[1].release()
            self._engines[making.key] = making.engine
            logging.info("LiveDiffusion: %s made for %s", self.name, making.shapes)
            return
        making.engine.release()
        if self._beside and making.epoch != self.epoch and not isinstance(error, Refused):
            self._rests_until = time.monotonic() + REST
            raise WeightsAway("the weights changed while it was compiled; it is tried again")
        if isinstance(error, WeightsAway):
            self._away = str(error) if self.placed else None
        elif self._beside or (isinstance(error, Refused) and not self.alone):
            _remember(self._broken, self._as_loaded(making.key), reason_of(error))
        raise error


def _remember(known: OrderedDict, key: Any, value: Any) -> None:
    known[key] = value
    while len(known) > 64:
        known.popitem(last=False)


_attached: weakref.WeakSet[Attached] = weakref.WeakSet()


def attach(patcher, attached: Attached, frees: bool = False):
    """A clone of a MODEL that runs on an engine.

    Args:
        frees: the engine goes when ComfyUI unloads the MODEL.

    Raises:
        ValueError: see `fixed`.
    """
    clone = fixed(patcher)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, ENGINE, attached.apply_model)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, ENGINE, attached.diffusion_model)
    around = clone.wrappers[WrappersMP.DIFFUSION_MODEL]
    if coherence.coherence_of(clone) is not None:  # inside, as where it is attached later
        around[COHERENCE] = around.pop(COHERENCE)
    clone.add_callback_with_key(CallbacksMP.ON_LOAD, ENGINE, attached.loaded)
    gone = attached.taken if frees else attached.unloaded
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, ENGINE, gone)
    return clone


def in_use(since: float) -> list[dict[str, Any]]:
    """What there is to say of the engines that have run since then (time.monotonic)."""
    return [attached.stats() for attached in list(_attached) if attached.used >= since]


def without(patcher):
    """A clone of a MODEL without an engine."""
    return _bare(patcher.clone())


def fixed(patcher):
    """A clone without an engine whose weights stay where they are loaded.

    Paged weights (ComfyUI's dynamic VRAM) have no address to rely on: see `weights.staying`.

    Raises:
        ValueError: the MODEL has only paged ones.
    """
    return _bare(staying(patcher))


def _bare(clone):
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
        clone.remove_wrappers_with_key(kind, ENGINE)
    for kind in (CallbacksMP.ON_LOAD, CallbacksMP.ON_DETACH):
        clone.remove_callbacks_with_key(kind, ENGINE)
    clone.remove_additional_models(ENGINE)
    return clone


def engine_of(patcher) -> Attached | None:
    """The engine that a MODEL runs on."""
    found = patcher.wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).get(ENGINE)
    return found[0].__self__ if found else None


def reason_of(error: Exception) -> str:
    """Why it failed, for people."""
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
