"""Patches with the habits of what people put on a model, at every place where it can be put.

A habit is a function of a tensor of rows and what it may look at; a place puts it on a model.
All of them begin anew with a frame that is sampled alone: those with a memory forget at the first
noise level. One habit is left out: drawing from torch's global generator, because what a frame
alone would draw is not defined where others are drawn for before it.
"""

import comfy.patcher_extension
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention

WRAP = comfy.patcher_extension.WrappersMP
KEY = "a test's habit"


class Look:
    """What is to be seen where a habit is called.

    Attributes:
        sigma: the noise level of each row, as it came.
        schedule: the noise levels of the sampling, or None.
        sides: ComfyUI's cond_or_uncond, or None.
    """

    def __init__(self, options, sigma=None):
        self.sigma = options["sigmas"] if sigma is None else sigma
        self.schedule = options.get("sample_sigmas")
        self.sides = options.get("cond_or_uncond")

    def first(self):
        """Whether this is the first step, by the first row."""
        return torch.isclose(self.sigma.view(-1)[0].cpu(), self.schedule[0].cpu())


def scaled(h, factors):
    return h * factors.view(-1, *[1] * (h.ndim - 1)).to(h)


def reads_sigma():
    """transformer_options["sigmas"][0] speaks for all rows."""
    return lambda h, look: h * (1.0 + 0.3 * torch.tanh(look.sigma.view(-1)[0] / 3).to(h))


def finds_step():
    """The step is where the first row's level stands in sample_sigmas."""

    def go(h, look):
        sigma = look.sigma.view(-1)[0].cpu()
        step = int((look.schedule.cpu() - sigma).abs().argmin())
        return h * (1.0 + 0.1 * (step + 1))

    return go


def counts_calls():
    """The step is how often it was called since the first level."""
    calls = [0]

    def go(h, look):
        calls[0] = 1 if look.first() else calls[0] + 1
        return h * (1.0 + 0.1 / calls[0])

    return go


def keeps_by_shape(forgets=True):
    """A part of the last result of the same shape goes into the next."""
    last = {}

    def go(h, look):
        if forgets and look.first():
            last.clear()
        before = last.get(h.shape)
        last[h.shape] = h.clone()
        return h if before is None else h + 0.3 * before

    go.forget = last.clear
    return go


def keeps_one():
    """A mean per row goes into the next result: a batch of another size is an error."""
    last = [None]

    def go(h, look):
        before = None if look.first() else last[0]
        last[0] = h.flatten(1).mean(1)
        return h * 0.9 if before is None else h * 0.9 + 0.3 * before.view(-1, *[1] * (h.ndim - 1))

    return go


def sums_rows():
    """The mean over the batch goes off every row."""
    return lambda h, look: h - 0.3 * h.mean(0, keepdim=True)


def indexes_rows():
    """Row i of the batch meets row i of a tensor of its own."""
    own = torch.tensor([1.3, 0.8, 1.1, 0.7, 1.2, 0.9, 1.4, 0.6, 1.05, 0.75, 1.15, 0.95])
    return lambda h, look: scaled(h, own[: h.shape[0]])


def reads_sides():
    """Conditional rows are told from unconditional ones by cond_or_uncond."""

    def go(h, look):
        sides = torch.tensor([1.3 if side == 0 else 0.8 for side in look.sides])
        return scaled(h, sides.repeat_interleave(h.shape[0] // len(sides)))

    return go


HABITS = {
    "reads sigmas[0]": reads_sigma,
    "finds its step": finds_step,
    "counts calls": counts_calls,
    "keeps by shape": keeps_by_shape,
    "keeps one": keeps_one,
    "sums rows": sums_rows,
    "indexes rows": indexes_rows,
    "reads cond_or_uncond": reads_sides,
}


def attn1_patch(model, f):
    model.set_model_attn1_patch(lambda q, k, v, o: (q, k, f(v, Look(o))))


def attn2_patch(model, f):
    model.set_model_attn2_patch(lambda q, k, v, o: (q, k, f(v, Look(o))))


def attn1_replace(model, f):
    def replace(q, k, v, options):
        return f(optimized_attention(q, k, v, options["n_heads"]), Look(options))

    model.set_model_attn1_replace(replace, "middle", 0)


def input_block(model, f):
    model.set_model_input_block_patch(lambda h, o: f(h, Look(o)))


def output_block(model, f):
    model.set_model_output_block_patch(lambda h, skip, o: (f(h, Look(o)), skip))


def model_function(model, f):
    def wrapper(apply, args):
        out = apply(args["input"], args["timestep"], **args["c"])
        return f(out, Look(args["c"]["transformer_options"]))

    model.set_model_unet_function_wrapper(wrapper)


def of_sampler(options, sigma):
    """A look from around a sampler's function, where sides are apart."""
    return Look({**options["transformer_options"], "cond_or_uncond": [0]}, sigma)


def cfg_function(model, f):
    def go(args):
        mixed = args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
        return f(mixed, of_sampler(args["model_options"], args["sigma"]))

    model.set_model_sampler_cfg_function(go)


def post_cfg_function(model, f):
    model.set_model_sampler_post_cfg_function(
        lambda args: f(args["denoised"], of_sampler(args["model_options"], args["sigma"]))
    )


def calc_cond_batch(model, f):
    def go(executor, inner, conds, x, sigma, options):
        outs = executor(inner, conds, x, sigma, options)
        # a side that is not asked for is zeros, and nothing to look at
        looks = [of_sampler(options, sigma) for _ in outs]
        return [
            out if cond is None else f(out, look)
            for out, cond, look in zip(outs, conds, looks, strict=True)
        ]

    model.add_wrapper_with_key(WRAP.CALC_COND_BATCH, KEY, go)


def apply_model(model, f):
    def go(executor, x, t, c_concat=None, c_crossattn=None, control=None,
           transformer_options=None, **kwargs):  # fmt: skip
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        return f(out, Look(transformer_options))

    model.add_wrapper_with_key(WRAP.APPLY_MODEL, KEY, go)


def diffusion_model(model, f):
    def go(executor, *args, **kwargs):
        dicts = [v for v in (*args, *kwargs.values()) if isinstance(v, dict) and "sigmas" in v]
        return f(executor(*args, **kwargs), Look(dicts[0]))

    model.add_wrapper_with_key(WRAP.DIFFUSION_MODEL, KEY, go)


def predict_noise(model, f):
    def go(executor, x, timestep, model_options=None, seed=None):
        out = executor(x, timestep, model_options, seed)
        return f(out, of_sampler(model_options, timestep))

    model.add_wrapper_with_key(WRAP.PREDICT_NOISE, KEY, go)


PLACES = {
    "attn1 patch": attn1_patch,
    "attn2 patch": attn2_patch,
    "attn1 replace": attn1_replace,
    "input block": input_block,
    "output block": output_block,
    "model function": model_function,
    "cfg function": cfg_function,
    "post cfg function": post_cfg_function,
    "CALC_COND_BATCH": calc_cond_batch,
    "APPLY_MODEL": apply_model,
    "DIFFUSION_MODEL": diffusion_model,
    "PREDICT_NOISE": predict_noise,
}


def forgetting(model):
    """State by shape in APPLY_MODEL that only OUTER_SAMPLE forgets, as caches do it."""
    f = keeps_by_shape(forgets=False)
    apply_model(model, f)

    def go(executor, *args, **kwargs):
        f.forget()
        try:
            return executor(*args, **kwargs)
        finally:
            f.forget()

    model.add_wrapper_with_key(WRAP.OUTER_SAMPLE, KEY, go)


def guider_with(habit, kind):
    """A class of guider of another pack that has the habit itself.

    Args:
        kind: the guider it extends.
    """
    f = habit()

    class Own(kind):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            out = super().predict_noise(x, timestep, model_options, seed)
            return f(out, of_sampler(model_options, timestep))

    return Own
