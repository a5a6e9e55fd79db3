"""A stream as it is beside the same one on a CUDA graph, or on what stands for one."""

import replaying
import tiny

SIGMAS = (10.0, 5.0, 2.0, 0.5, 0.0)


def compiled(patcher, recording=replaying.Replaying):
    """The MODEL on a CUDA graph that needs no GPU, and its engine."""
    from livediffusion.compiled.cudagraph import CudaGraph
    from livediffusion.host.models.engines import Attached, attach

    said = []
    attached = Attached("cudagraph", "test", lambda: CudaGraph(recording), said.append)
    attached.said = said
    return attach(patcher, attached), attached


def guider(model, mode="self-negative", cfg=1.4, delta=1.0, prompt=1, tokens=8, pooled=None):
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling.guider import RCFGGuider

    made = RCFGGuider(model, Guidance(mode, cfg, delta))
    negative = tiny.conditioning(2, tokens, pooled)
    made.set_conds(tiny.conditioning(prompt, tokens, pooled), negative)
    return made


class Pair:
    """A stream as it is, and the same one on a graph."""

    def __init__(self, patcher, frames_per_slot=1, recording=replaying.Replaying):
        from livediffusion.host.sampling.stream import Stream

        self.plain, self.graph = Stream(frames_per_slot), Stream(frames_per_slot)
        self.graph.recorded._new = recording
        self.f = frames_per_slot
        self.use(patcher, recording)

    def use(self, patcher, recording=replaying.Replaying):
        self.patcher = patcher
        self.compiled, self.attached = compiled(patcher, recording)

    def guide(self, **knobs):
        self.guiders = guider(self.patcher, **knobs), guider(self.compiled, **knobs)

    def run(self, settings, latents):
        """The output of both."""
        a = self.plain.run(self.guiders[0], latents, settings)
        b = self.graph.run(self.guiders[1], latents, settings)
        return a, b

    @property
    def captures(self):
        return self.graph.recorded.captures


def settings(sigmas=SIGMAS, rule="lcm", seed=0, **more):
    from livediffusion.host.sampling.stream import Settings

    return Settings(tuple(sigmas), rule, seed, **more)
