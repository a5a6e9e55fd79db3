"""ComfyUI 0.38 and later: its compiler of allocations stays out of what is recorded."""

import contextlib

import pytest
import replaying
import tiny
import torch

pytestmark = pytest.mark.comfy


class Compiler:
    """What comfy.model_prefetch has from 0.38 on, as far as a model's forward meets it."""

    def __init__(self):
        self.recording = False  # a graph of ours is being recorded
        self.placed = {True: 0, False: 0}  # calls whose allocations it places, by that
        self.paused = []

    @contextlib.contextmanager
    def pause(self, sync=False):
        self.paused.append(sync)
        yield

    def begin(self, args):
        if not args.disable_comfy_compiler:
            self.placed[self.recording] += 1


@pytest.fixture
def compiler(comfyui, monkeypatch):
    from comfy.cli_args import args
    from livediffusion.host.models import engines
    from livediffusion.host.sampling import recordings

    comfy = pytest.importorskip("comfy.model_prefetch")
    made = Compiler()
    monkeypatch.setattr(args, "disable_comfy_compiler", False, raising=False)
    monkeypatch.setattr(comfy, "pause_malloc_graph", made.pause, raising=False)
    for module in (engines, recordings):
        monkeypatch.setattr(module, "REST", 0.0)
    with torch.inference_mode():
        yield made
    assert args.disable_comfy_compiler is False


def test_nothing_is_recorded_at_addresses_that_comfyui_places(compiler, monkeypatch):
    """The UNet alone, as an engine, and the whole tick: either runs the model while recording."""
    import comfy.samplers
    from comfy.cli_args import args
    from pairs import Pair, settings

    class Recording(replaying.Replaying):
        def capture(self, work):
            compiler.recording = True
            try:
                return super().capture(work)
            finally:
                compiler.recording = False

    # which the UNet calls; a forward of its own would be a part that a node has replaced
    from comfy.ldm.modules.diffusionmodules import openaimodel

    embedding = openaimodel.timestep_embedding

    def around(*of, **kwargs):
        compiler.begin(args)
        return embedding(*of, **kwargs)

    monkeypatch.setattr(openaimodel, "timestep_embedding", around)
    model = tiny.model()
    pair = Pair(model, recording=Recording)
    pair.guide()
    for i in range(8):
        a, b = pair.run(settings(), tiny.latents(1, i))
        assert tiny.rms(b, a) <= 1e-6
    assert pair.captures == 1
    # it works for what is not recorded, and for nothing that is
    assert compiler.placed[False] and not compiler.placed[True]
    assert compiler.paused == [True]
    alone = comfy.samplers.CFGGuider(pair.compiled)
    alone.set_conds(tiny.conditioning(1), tiny.conditioning(2))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(10.0, 0.0, 13)
    alone.sample(noise, torch.zeros_like(noise), comfy.samplers.ksampler("euler"), levels,
                 disable_pbar=True)  # fmt: skip
    assert pair.attached.ran > 8
    assert not compiler.placed[True] and len(compiler.paused) > 1


def test_a_comfyui_without_it_is_left_alone(comfyui):
    from comfy.cli_args import args
    from livediffusion.host.models.compiler import uncompiled

    before = dict(vars(args))
    with uncompiled():
        assert vars(args).keys() == before.keys()
    assert vars(args) == before
