"""What a tick costs beside the UNet, counted from the stream's side: all that ComfyUI adds, too."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

LEVELS = {1: (3.0, 0.0), 2: (3.0, 1.0, 0.0), 4: (8.0, 3.0, 1.2, 0.5, 0.0)}
MOST = {"off": 6, "full": 7, "self-negative": 8, "onetime-negative": 11}


class Spy(TorchDispatchMode):
    """Counts aten ops that are no view."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", LEVELS)
@pytest.mark.parametrize("mode", MOST)
@pytest.mark.parametrize("rule", ["lcm", "euler"])
def test_operations_per_tick_outside_the_unet(monkeypatch, rule, mode, n):
    import tiny
    from livediffusion.engine.guidance import Guidance
    from livediffusion.host.sampling.guider import RCFGGuider
    from livediffusion.host.sampling.stream import Settings, Stream

    model = tiny.model()
    monkeypatch.setattr(model.model.diffusion_model, "_forward", lambda x, *args, **kwargs: x)
    guider = RCFGGuider(model, Guidance(mode, 1.4, 0.9))
    guider.set_conds(tiny.conditioning(1), tiny.conditioning(2))
    stream, counts = Stream(), []
    tick = stream.ring.tick

    def counted(*args, **kwargs):
        with Spy() as spy:
            out = tick(*args, **kwargs)
        counts.append(spy.count)
        return out

    stream.ring.tick = counted
    for i in range(n + 12):
        assert stream.run(guider, tiny.latents(1, i), Settings(LEVELS[n], rule, 0)).isfinite().all()
    steady = set(counts[-8:])
    assert len(steady) == 1 and steady.pop() <= MOST[mode]
