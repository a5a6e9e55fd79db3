"""A naive reference of what a stream keeps of its network: frames in a list, the full UNet for each
row by itself, and a feature put into its place by hand.

Nothing of the engine's blocks is used but the picture of a frame, which has tests of its own.
"""

import torch
from livediffusion.engine import similarity


class Naive:
    """A stream of the lcm rule whose rows go on with kept features.

    Args:
        model: a BaseModel.
        at: the output block that a kept feature comes into.
        control: (x [1, C, H, W], sigma [1], prompt [1, T, D]) to a ControlNet's residuals of a row.
    """

    def __init__(self, model, at, control=None):
        self.model, self.at, self.control = model, at, control
        self.frames, self.count, self.ticks, self.made_of = [], 0, 0, None
        self.kept = {}  # (side, slot, index): feature, what it depends on, looks
        self.ran = []  # of each tick, the rows that ran whole and all rows

    def run(self, sources, prompts, sigmas, noise, guidance, reuse, made_of=(), ys=(None, None)):
        """A tick; F sources enter. Gives the latents that leave, [b, C, H, W], or None.

        Args:
            prompts: (name, tensors of its prompt and negative [1, T, D]) of each frame.
            noise: engine.noise.SlotNoise.
            guidance: mode, cfg, delta.
            reuse: interval, awake.
            made_of: whatever else nothing that is kept survives a change of.
            ys: pooled prompts of both sides.
        """
        n, f, self.ys = len(sigmas) - 1, len(sources), ys
        made_of = n, f, sources.shape[1:], made_of
        if made_of != self.made_of:
            if self.made_of is not None and self.made_of[2] != made_of[2]:
                self.frames = []
            self.kept, self.made_of = {}, made_of
        self.frames.append([
            {"number": self.count + i, "k": 0, "sigmas": sigmas, "noise": noise,
             "prompt": prompts[i], "index": i,
             "looks": self.looks(sources[i : i + 1], reuse),
             "source": sources[i : i + 1].nan_to_num(0.0, 0.0, 0.0),
             "x": sources[i : i + 1] + sigmas[0] * noise.slot(0)}
            for i in range(f)
        ])  # fmt: skip
        self.count += f
        self.ran.append([0, 0])
        for group in self.frames:
            for frame in group:
                self.step(frame, guidance, n, reuse)
        self.ticks += 1
        left = [g for g in self.frames if g[0]["k"] == len(g[0]["sigmas"]) - 1]
        if left:
            self.frames = self.frames[self.frames.index(left[-1]) + 1 :]
            return torch.cat([frame["x"] for frame in left[-1]])
        return None

    def step(self, frame, guidance, n, reuse):
        mode, cfg, delta = guidance
        k, sigmas, x = frame["k"], frame["sigmas"], frame["x"]
        negative = (mode == "full" and cfg != 1) or (mode == "onetime-negative" and k == 0)
        known = len(sigmas) - 1 == n
        depends = tuple(sigmas), frame["prompt"][0], frame["noise"].seed

        def stands(side):
            """Whether what is kept stands for a side of this frame."""
            kept = self.kept.get((side, k, frame["index"])) if known else None
            if kept is None or kept[1] != depends or self.due(k, n, frame, reuse):
                return False
            return not reuse["awake"] or alike(kept[2], frame["looks"]) >= reuse["awake"]

        sides = [0, 1] if negative else [0]
        whole = not all(stands(side) for side in sides)
        d = [self.predict(frame, side, whole, known, depends) for side in sides]
        u = None
        if mode == "full" and negative:
            u = d[1]
        elif mode == "onetime-negative":
            if negative:
                frame["reference"] = d[1]
            u = x - delta * (x - frame["reference"])
        elif mode == "self-negative":
            u = x - delta * (x - frame["source"])
        d = d[0] if u is None else u + cfg * (d[0] - u)
        last = k == len(sigmas) - 2 and sigmas[-1] == 0
        x = d if last else d + sigmas[k + 1] * frame["noise"].slot(k + 1)
        frame["x"], frame["k"] = x.nan_to_num(0.0, 0.0, 0.0), k + 1

    def predict(self, frame, side, whole, known, depends):
        place, own = (side, frame["k"], frame["index"]), {}
        kept = self.kept.get(place)

        def patch(h, skip, options):
            if options["block"] == ("output", self.at):
                own["h"] = h.clone()
                if not whole:
                    h = kept[0].clone()
            return h, skip

        sigma, words = torch.tensor([frame["sigmas"][frame["k"]]]), frame["prompt"][1][side]
        out = self.model.apply_model(
            frame["x"], sigma, c_crossattn=words, y=self.ys[side],
            control=self.control and self.control(frame["x"], sigma, words),
            transformer_options={
                "cond_or_uncond": [side], "sigmas": sigma,
                "patches": {"output_block_patch": [patch]},
            },
        )  # fmt: skip
        self.ran[-1][0] += whole
        self.ran[-1][1] += 1
        if whole and known:
            if own["h"].isfinite().all():
                self.kept[place] = own["h"], depends, frame["looks"]
            elif kept is not None and kept[1] != depends:
                del self.kept[place]
        return out

    def due(self, k, n, frame, reuse):
        """Once in `interval` ticks, the later the earlier the step."""
        return (self.ticks + k + n * frame["index"]) % reuse["interval"] == 0

    def looks(self, source, reuse):
        """What a frame looks like, by ComfyUI's preview colours; None where nobody looks."""
        if not reuse["awake"] or not source.isfinite().all():
            return None
        factors = torch.tensor(self.model.latent_format.latent_rgb_factors)
        return similarity.sketch((source[0].movedim(0, -1) @ factors + 1) / 2)


def alike(a, b):
    """The correlation of the two pictures' cells."""
    if a is None or b is None or abs(a.light - b.light) > 0.1:
        return -1.0
    a, b = (view.views[0].values.flatten().double() for view in (a, b))
    return 1 - float(((a - b) ** 2).mean()) / 2


class Remembering(Naive):
    """One with a memory, too: every layer of a row looks at what is remembered, and a keyframe is
    the first frame of its turn that runs whole.

    Args:
        outs: blocks whose outputs are fused.
        memory: what engine.coherence.neighbours.Memory takes.
    """

    def __init__(self, model, at, outs, memory):
        super().__init__(model, at)
        self.outs, self.memory = outs, memory
        self.bank, self.last, self.origin = {}, {}, 0
        self.generator = torch.Generator().manual_seed(0)

    def run(self, *args, **more):
        import coherent

        self.staged, self.chosen = {}, {}
        out = super().run(*args, **more)
        kind = self.memory["bank"], self.memory["frames"] if self.memory["bank"] == "queue" else 1
        coherent.Naive._put(self, self.staged, kind)
        self.last |= self.chosen
        return out

    def turn(self, number):
        return number // self.memory["interval"]

    def predict(self, frame, side, whole, known, depends):
        import coherent

        slot = (side, frame["k"])
        kept, wrote, memory = self.bank.get(slot, {}), {}, self.memory

        def attend(block, q, k, v, heads, options):
            seen = kept.get(block, [])
            wrote[block] = [k[0], v[0], None]
            keys = torch.cat([k[0], *[one[0] for one in seen]])
            values = torch.cat([v[0], *[one[1] for one in seen]])
            return coherent.softmax(q[0], keys, values, heads)[None]

        def fuse(block, o, options):
            if block not in self.outs:
                return o
            seen = kept.get(block, [])
            if seen and memory["fuse"]:
                everything = torch.cat([one[2] for one in seen])
                o = coherent.fused(o[0], everything, memory["fuse"], memory["threshold"])[None]
            wrote[block][2] = o[0]
            return o

        with coherent.replaced(lambda block: True, attend, fuse):
            out = super().predict(frame, side, whole, known, depends)
        before = self.chosen.get(slot, self.last.get(slot))
        if whole and (before is None or self.turn(frame["number"]) > self.turn(before)):
            self.staged[slot], self.chosen[slot] = wrote, frame["number"]
        return out

