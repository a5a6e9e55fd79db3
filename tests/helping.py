"""MODELs whose frames help each other, and streams of them on an engine beside the UNet itself."""

import tiny
import torch
from compiled_models import lora

SIGMAS = (10.0, 5.0, 2.0, 0.5, 0.0)
NEAR = 1e-4
MEMORY = {"frames": 2, "interval": 2, "bank": "queue", "fuse": 0.4, "threshold": 0.5}
FUTURE = {"levels": "all"}
REUSE = {"interval": 3, "depth": "finest level", "awake": 0.0}


def helping(patcher, memory=None, future=None, reuse=None):
    """A MODEL whose frames help each other, or go on with what was kept."""
    from livediffusion.engine.blocks.schedule import Reuse
    from livediffusion.engine.coherence.neighbours import Future, Memory
    from livediffusion.host.models.coherence import attach

    if memory is not None:
        patcher = attach(patcher, memory=Memory(**{"levels": "all", **MEMORY, **memory}))
    if future is not None:
        patcher = attach(patcher, future=Future(**{**FUTURE, **future}))
    if reuse is not None:
        patcher = attach(patcher, reuse=Reuse(**{**REUSE, **reuse}))
    return patcher


class Beside:
    """A stream of the UNet itself, and the same one on an engine.

    Args:
        first: the engine comes before the nodes that let frames help each other.
        conds: gives the prompt and the negative of a number; random ones if it is not given.
        near: how far the one may be from the other.
    """

    def __init__(
        self, model, engine="onnxruntime", frames=1, first=False, conds=None, near=NEAR
    ):  # fmt: skip
        from livediffusion.compiled import choice
        from livediffusion.host.models.engines import Attached
        from livediffusion.host.sampling.stream import Stream

        self.model, self.first, self.conds, self.near = model, first, conds, near
        self.said = []
        make = engine if callable(engine) else lambda: choice.make(engine, torch.device("cpu"))
        name = "own" if callable(engine) else engine
        self.attached = Attached(name, "for a test", make, self.said.append)
        self.streams = Stream(frames), Stream(frames)
        self.asked = None

    def run(self, latents, sigmas=SIGMAS, seed=0, mode="self-negative", cfg=1.4, delta=1.0,
            prompt=1, strength=None, memory=None, future=None, reuse=None):  # fmt: skip
        """Runs both, holds them to each other, and gives what came out."""
        import pairs
        from livediffusion.host.models.engines import attach

        asked = mode, cfg, delta, prompt, strength, memory, future, reuse
        if asked != self.asked:
            self.asked = asked
            pooled = self.model.model.model_config.unet_config.get("adm_in_channels")
            base = self.model if strength is None else lora(self.model, strength)
            models = [
                helping(base, memory, future, reuse),
                helping(attach(base, self.attached), memory, future, reuse)
                if self.first
                else attach(helping(base, memory, future, reuse), self.attached),
            ]
            self.guiders = [
                pairs.guider(m, mode, cfg, delta, prompt, pooled=pooled) for m in models
            ]
            for guider in self.guiders if self.conds else ():
                guider.set_conds(*self.conds(prompt))
        settings = pairs.settings(sigmas, seed=seed)
        wanted, ours = (
            stream.run(guider, latents, settings)
            for stream, guider in zip(self.streams, self.guiders, strict=True)
        )
        assert tiny.rms(ours, wanted) <= self.near
        return wanted

    def steady(self, latents, runs=3, **settings):
        """Runs that the engine alone does."""
        ran, fell = self.attached.ran, self.attached.fell_back + self.attached.unsettled
        for i in range(runs):
            self.run(latents(i), **settings)
        assert self.attached.reason is None, self.attached.reason
        assert self.attached.ran >= ran + runs
        assert self.attached.fell_back + self.attached.unsettled == fell


KINDS = {
    "queue": {"memory": {}},
    "merged": {"memory": {"bank": "merged"}},
    "unfused": {"memory": {"fuse": 0.0}},
    "future": {"future": {}},
    "both": {"memory": {"bank": "merged", "interval": 3}, "future": {}},
}
