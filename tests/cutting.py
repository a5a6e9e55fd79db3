"""MODELs that pass bodies of their network by, and the same cut by hand, module by module."""

import functools
import math

import tiny
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

LEVELS = (14.6146, 3.0, 0.8)


@functools.cache
def plain(layout="SD1.5"):
    return tiny.model(layout=layout)


def names(layout="SD1.5"):
    from livediffusion.host.models.walk import bodies

    return list(bodies(plain(layout).model.diffusion_model))


def chosen(seed, layout="SD1.5"):
    """For each of LEVELS about a third of the bodies."""
    chance = torch.Generator().manual_seed(seed)
    return [
        {name for name in names(layout) if torch.rand((), generator=chance) < 0.35}
        for _ in LEVELS
    ]


def skipping(skips, layout="SD1.5", levels=LEVELS):
    from livediffusion.host.models.skips import skipping

    return skipping(plain(layout), levels, skips)


def cut(skips, layout="SD1.5"):
    """The same MODEL made anew, its modules cut by hand for the one level of each call."""
    patcher = tiny.model(layout=layout)
    inner, now = patcher.model, [frozenset()]
    for name in names(layout):
        side, number, i = name.split(".")
        unet = inner.diffusion_model
        block = unet.middle_block if side == "middle" else getattr(unet, f"{side}_blocks")
        part = (block if side == "middle" else block[int(number)])[int(i)]
        whole = part.forward

        def forward(x, *args, _name=name, _part=part, _whole=whole, **kwargs):
            if _name not in now[0]:
                return _whole(x, *args, **kwargs)
            return _part.skip_connection(x) if isinstance(_part, ResBlock) else x

        part.forward = forward
    apply_model = inner.apply_model

    def at_level(x, t, *args, **kwargs):
        level = float(t.flatten()[0])
        assert (t == level).all()
        near = min(range(len(LEVELS)), key=lambda k: abs(math.log(LEVELS[k] / level)))
        now[0] = skips[near]
        return apply_model(x, t, *args, **kwargs)

    inner.apply_model = at_level
    return patcher
