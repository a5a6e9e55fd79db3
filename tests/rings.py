"""A ring on a cheap nonlinear denoiser, and the same frames sampled alone."""

import math

import torch
from livediffusion.engine.fold import Level
from livediffusion.engine.linear import Linear
from livediffusion.engine.noise import SlotNoise
from livediffusion.engine.ring import Ring
from livediffusion.engine.space import Mix
from livediffusion.engine.step_rules import STEP_RULES, Course

SHAPE = (2, 3, 3)


class VarianceExploding:
    """Epsilon, v and EDM models (Karras et al. 2022): x = latent + sigma * noise."""

    def mix(self, sigma: float) -> Mix:
        return Mix(1.0, sigma)

    entry = mix

    def unmix(self, sigma: float) -> float:
        return 1.0


class Flow:
    """Rectified flow (Liu et al. 2022): x = (1 - sigma) * latent + sigma * noise, sigma in 0..1."""

    def mix(self, sigma: float) -> Mix:
        return Mix(1.0 - sigma, sigma)

    entry = mix

    def unmix(self, sigma: float) -> float:
        return 1.0 / (1.0 - sigma)


SPACES = {"ve": VarianceExploding(), "flow": Flow()}


def levels(space, n):
    top = 0.9 if space == "flow" else 9.0
    return (*[top * (n - i) / n for i in range(n)], 0.0)


def course(rule="lcm", n=4, space="ve", **kwargs):
    return Course(levels(space, n), STEP_RULES[rule], SPACES[space], **kwargs)


def frames(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def denoise(x, sigma, prompt):
    """Row-wise, nonlinear, different for every prompt; float64 inside for exact comparisons."""
    s = sigma.view(-1, 1, 1, 1)
    p = prompt.view(-1, 1, 1, 1)
    return torch.tanh(x / (1 + s) + p) + 0.1 * torch.sin(x * p)


class Model:
    """Counts calls and rows; a payload is the number a prompt is to this model."""

    def __init__(self):
        self.calls, self.rows = 0, 0

    def predict(self, rows, which):
        prompt = torch.tensor([float(p) for place in rows.places for p in place.payloads])
        x, sigma, r = rows.x, rows.sigma, rows.x.shape[0]
        if which != "none":
            at = slice(None) if which == "all" else rows.entered
            x, sigma = torch.cat([x, x[at]]), torch.cat([sigma, sigma[at]])
            prompt = torch.cat([prompt, torch.full((x.shape[0] - r,), -0.7)])
        self.calls += 1
        self.rows += x.shape[0]
        out = denoise(x, sigma, prompt)
        return out[:r], (out[r:] if which != "none" else None)

    def guide(self, guidance):
        return lambda rows: guidance(rows, self.predict)


def level(sigma):
    """A v-like family: the model sees a scaled x, and x0 takes of x and of the output."""
    scale = 1 / math.sqrt(1 + sigma**2)
    return Level(scale, scale**2, -sigma * scale, 100 * sigma)


class Raw(Model):
    """The same model, known by its raw output only (engine.linear)."""

    def guide(self, guidance):
        def road(work, _):
            prompt = [float(p) for place in work.places for p in place.payloads]
            r = len(prompt)
            which = {"full": "all", "onetime-negative": "entered"}.get(guidance.mode, "none")
            if which == "entered" and work.source is None:
                which = "none"
            extra = {"none": 0, "all": r}.get(which, len(range(r)[work.plan.entered]))
            prompt = [-0.7] * extra + prompt if which == "all" else prompt + [-0.7] * extra

            def call(y, fold):
                sigmas = (fold.timestep / 100).tolist()
                seen, of_x, of_output, _ = torch.tensor([level(s) for s in sigmas]).T.unbind()
                wide = [t.view(-1, 1, 1, 1) for t in (seen, of_x, of_output)]
                x = y / wide[0]
                self.calls += 1
                self.rows += y.shape[0]
                d = denoise(x, fold.timestep / 100, torch.tensor(prompt))
                return (d - x * wide[1]) / wide[2]

            return work(Linear(guidance, which, level, call))

        return road


def unipc_update(x, given, sigmas, k, order, arrived=None):
    """Zhao et al. 2023: from level k - 1 to level k; corrected by the prediction made there.

    The Lagrange polynomial through the predictions at `order` levels (and the arrived one) is
    matched in its Taylor terms, as the paper's equations 5 and 9 ask for.
    """
    h = math.log(sigmas[k - 1] / sigmas[k])
    places = [math.log(sigmas[k - 1] / sigmas[k - 1 - i]) / h for i in range(1, order)]
    slopes = [(given[-1 - i] - given[-1]) / place for i, place in enumerate(places, 1)]
    if arrived is not None:
        places, slopes = [*places, 1.0], [*slopes, arrived - given[-1]]
    count = len(places)
    # phi_1(-h) = (1 - exp(-h)) / h, then phi_(i+1)(-h) = (1 / i! - phi_i(-h)) / h
    phi = [(1 - math.exp(-h)) / h]
    for i in range(1, count + 1):
        phi.append((1 / math.factorial(i) - phi[-1]) / h)
    wanted = [phi[i] * math.factorial(i) for i in range(1, count + 1)]
    if count < 2:
        rhos = [0.5] * count
    else:
        powers = torch.tensor([[p**i for p in places] for i in range(count)], dtype=torch.float64)
        rhos = torch.linalg.solve(powers, torch.tensor(wanted, dtype=torch.float64)).tolist()
    ratio = sigmas[k] / sigmas[k - 1]
    out = ratio * x + (1 - ratio) * given[-1]
    for rho, slope in zip(rhos, slopes, strict=True):
        out = out + h * rho * slope
    return out


def unipc_order(k, n):
    most = max(1, min(3, n - 1))
    return k if k < most else min(most, n + 1 - k)


def pfdiff_alone(x, sigmas, rule, predict):
    """Wang et al. 2025, Algorithm 1, over Euler: x, then a call at each springboard."""
    n, at = len(sigmas) - 1, 1
    noise = (x - predict(x, sigmas[0])) / sigmas[0]
    x = x + (sigmas[1] - sigmas[0]) * noise
    calls = 1
    while at < n:
        to = min(at + rule.k + 1, n)
        call = min(at + rule.h, to - 1)
        springboard = x + (sigmas[call] - sigmas[at]) * noise
        noise = (springboard - predict(springboard, sigmas[call])) / sigmas[call]
        x = x + (sigmas[to] - sigmas[at]) * noise
        at, calls = to, calls + 1
    assert calls == 1 + -(-(n - 1) // (rule.k + 1))
    return x


def alone(source, prompt, the_course, noise, guidance):
    """Sequential sampling of one frame, written without the engine's ring or weights."""
    sigmas, space, rule = the_course.sigmas, the_course.space, the_course.rule
    name, z, mix = type(rule).__name__, source[None], the_course.space.mix(the_course.sigmas[0])
    x = mix.source * z + mix.noise * noise.slot(0)
    reference = []  # of a onetime-negative frame, made with its first call

    def predict(x, sigma):
        s = torch.tensor([sigma])
        d = denoise(x, s, torch.tensor([prompt]))
        negative = denoise(x, s, torch.tensor([-0.7]))
        reference.append(z if guidance.mode == "self-negative" else negative)
        if guidance.mode == "full":
            return negative + guidance.cfg * (d - negative)
        if guidance.mode == "off":
            return d
        u = x - guidance.delta * (x - reference[0])
        return u + guidance.cfg * (d - u)

    if name == "PFDiff":
        return pfdiff_alone(x, sigmas, rule, predict)[0].float()
    old, base, given, n = None, x, [], len(sigmas) - 1
    for k in range(n):
        d = predict(x, sigmas[k])
        a, b = sigmas[k], sigmas[k + 1]
        if name == "Lcm":
            mix = space.mix(b)
            x = d if b == 0 else mix.source * d + mix.noise * noise.slot(k + 1)
        elif name == "UniPC":
            if k > 0:
                base = unipc_update(base, given, sigmas, k, unipc_order(k, n), d)
            given.append(d)
            x = d if b == 0 else unipc_update(base, given, sigmas, k + 1, unipc_order(k + 1, n))
        elif name == "Deis":
            given.append((x - d) / a)
            order = 1 if b == 0 else min(3, k + 1)
            # the coefficients are compared with ComfyUI's in tests/host/test_equivalence.py
            gains = [b - a] if order == 1 else rule._gains(rule._times(sigmas[: k + 2]), order)
            for gain, one in zip(gains, reversed(given), strict=False):
                x = x + gain * one
        elif name == "Euler" or k == 0 or b == 0:
            x = x + (x - d) / a * (b - a)
        else:
            t, tn, tl = (-torch.tensor(v, dtype=torch.float64).log() for v in (a, b, sigmas[k - 1]))
            r = (t - tl) / (tn - t)
            mixed = (1 + 1 / (2 * r)) * d - (1 / (2 * r)) * old
            x = (b / a) * x - float(torch.expm1(-(tn - t))) * mixed
        old = d
    return x[0].float()


def run(ring, model, guidance, *args):
    """A tick of either kind of model."""
    guide = model.guide(guidance)
    return ring.tick(guide, *args, road=guide if isinstance(model, Raw) else None)


def clip(sources, prompts, the_course, guidance, per_slot, model=None, noise=None):
    """All frames through a ring that is drained at the end: outputs, ticks."""
    model = model or Model()
    ring, noise = Ring(per_slot), noise or SlotNoise(3, SHAPE)
    out, ticks = [], 0
    for i in range(0, len(sources), per_slot):
        part = slice(i, i + per_slot)
        tick = run(ring, model, guidance, sources[part], prompts[part], the_course, noise)
        ticks += 1
        out += tick.finished
    while ring.in_flight:
        out += run(ring, model, guidance).finished
        ticks += 1
    return torch.cat([latents for _, latents in out]), [p for ps, _ in out for p in ps], ticks
