"""Naive references of what lets frames help each other, in the place of ComfyUI's own attention.

Nothing of the engine is used: plain lists, one frame or one row at a time.
"""

import contextlib

import comfy.ldm.modules.attention as attention
import tiny
import torch


def model(layout="SD1.5"):
    """A tiny MODEL whose tokens differ: its self-attention looks at some more than at others."""
    patcher = tiny.model(layout=layout, prompt=1.0)
    for name, weight in patcher.model.diffusion_model.named_parameters():
        if "attn1.to_q" in name or "attn1.to_k" in name:
            weight.data.mul_(3.0)
        # else what is the same for all tokens is most of them
        if name.endswith(".bias"):
            weight.data.mul_(0.1)
        elif weight.ndim == 1:
            weight.data.fill_(1.0)
    return patcher


def softmax(q, k, v, heads):
    """Attention of one row, [S, C], in float64."""
    d = q.shape[-1] // heads
    out = []
    for h in range(heads):
        a, b, c = (t[:, h * d : (h + 1) * d].double() for t in (q, k, v))
        out.append((a @ b.T / d**0.5).softmax(-1) @ c)
    return torch.cat(out, 1).to(q.dtype)


@contextlib.contextmanager
def replaced(acting, attend, fuse=lambda block, o, options: o):
    """While this lasts, self-attention in the blocks `acting` (block, q, k, v, options) is another.

    By the class, since streams notice patches. `attend` gives [R, S, C] of [R, S, C] each.
    """
    kind = attention.BasicTransformerBlock
    before = kind.forward

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006 as ComfyUI has it
        block = (*transformer_options["block"], transformer_options["block_index"])
        if not acting(block):
            return before(self, x, context, transformer_options)
        n = self.norm1(x)
        q, k, v = (part(n) for part in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v))
        o = self.attn1.to_out(attend(block, q, k, v, self.n_heads, transformer_options))
        x = x + fuse(block, o, transformer_options)
        other = transformer_options.get("patches_replace", {}).get("attn2", {}).get(block[:2])
        n = self.norm2(x)
        if other is None:
            x = x + self.attn2(n, context=context)
        else:
            q, k, v = self.attn2.to_q(n), self.attn2.to_k(context), self.attn2.to_v(context)
            extra = {**transformer_options, "n_heads": self.n_heads}
            x = x + self.attn2.to_out(other(q, k, v, extra))
        return x + self.ff(self.norm3(x))

    kind.forward = forward
    try:
        yield
    finally:
        kind.forward = before


def future(sides, frames):
    """Future attention written out: one softmax over all rows of a side and an index.

    Args:
        sides: gives the side of each row of a call, by its rows and ComfyUI's labels.
        frames: F; row r of a side is frame r % F of its slot.
    """

    def attend(block, q, k, v, heads, options):
        side = sides(q.shape[0], options["cond_or_uncond"])
        place = [sum(other == one for other in side[:r]) for r, one in enumerate(side)]
        out = []
        for r in range(len(side)):
            seen = [
                j for j in range(len(side))
                if side[j] == side[r] and place[j] % frames == place[r] % frames
            ]  # fmt: skip
            out.append(softmax(q[r], torch.cat([*k[seen]]), torch.cat([*v[seen]]), heads))
        return torch.stack(out)

    return attend


NEAR = 1e-5  # relative RMS: rounding
TIE = 1e-6  # cosines that are nearer to each other than this are rounding apart
EITHER = 1e-3  # as far apart as pictures are in which such a tie was decided the other way


class Ties:
    """Choices among tokens that rounding decides, since `begin`: either choice is right.

    Attributes:
        count: of these.
        strict: pictures that were compared before the first of them, so to rounding.
    """

    count = strict = 0

    @classmethod
    def begin(cls):
        cls.count = cls.strict = 0

    @classmethod
    def chosen(cls, row, among, threshold=None):
        """The index, of `among`, of the highest of a row; whether that was one is kept in mind."""
        best, *second = row[among].topk(min(2, len(row[among])))[0].tolist()
        close = [best - other for other in second] + (
            [abs(best - threshold)] if threshold is not None else []
        )
        # the very same token twice is no choice
        cls.count += any(0 < gap < TIE for gap in close)
        return int(row[among].argmax())


def near(ours, wanted):
    """Whether two pictures of a memory are the same, to rounding and what it decides."""
    import tiny

    Ties.strict += not Ties.count
    error = float(tiny.rms(ours, wanted))
    return error <= (EITHER if Ties.count else NEAR)


def cosines(a, b):
    """Of every token of a with every one of b, in float64."""
    a, b = a.double(), b.double()
    return (a / a.norm(dim=-1, keepdim=True)) @ (b / b.norm(dim=-1, keepdim=True)).T


def merged(new, old, order):
    """Pairs of tokens written out, token by token: (k, v, o) of both are [N, C] each."""
    n = len(new[0])
    both = [[*a, *b] for a, b in zip(new, old, strict=True)]
    kept, sources = order[:n].tolist(), order[n:].tolist()
    alike = cosines(torch.stack(both[0]), torch.stack(both[0]))
    heaps = {d: [d] for d in kept}
    for s in sources:
        heaps[kept[Ties.chosen(alike[s], kept)]].append(s)
    return [
        torch.stack([torch.stack([part[t] for t in heaps[d]]).double().mean(0) for d in kept])
        .to(part[0].dtype)
        for part in both
    ]  # fmt: skip


def fused(o, kept, amount, threshold):
    """Feature fusion of one row, [S, C], token by token."""
    alike, out = cosines(o, kept), []
    for t, row in enumerate(alike):
        best = Ties.chosen(row, slice(None), threshold)
        far = float(row[best]) <= threshold
        out.append(o[t] if far else (1 - amount) * o[t] + amount * kept[best])
    return torch.stack(out)


class Naive:
    """A stream of the lcm rule with a memory: frames in a list, a model call for each.

    Args:
        model: a BaseModel.
        outs: blocks whose outputs are fused.
        options: transformer_options of each call.
        levels: by their names, the blocks that remember; all where it has none of that name.
    """

    def __init__(self, model, outs, options=None, levels=None):
        self.model, self.outs = model, outs
        self.options, self.levels = options or {}, levels or {}
        self.frames, self.count, self.known = [], 0, None

    def run(self, sources, conds, settings, guidance, memory):
        """A tick; F sources enter. Gives the latents that leave, [b, C, H, W], or None.

        Args:
            conds: of prompt and negative what apply_model takes by name, `c_crossattn` [1, T, D]
                among it; what can be called gives it for x and sigma.
            settings: sigmas and noise (engine.noise.SlotNoise).
            guidance: mode, cfg, delta.
            memory: what engine.coherence.neighbours.Memory takes.
        """
        self.acting = self.levels.get(memory["levels"])
        sigmas, noise = settings
        n, f = len(sigmas) - 1, len(sources)
        kind = (memory["bank"], memory["frames"] if memory["bank"] == "queue" else 1)
        shape = tuple(sources.shape[1:])
        known = (n, f, kind, shape, memory["levels"], memory["fuse"] > 0)
        if known != self.known:
            if self.known is not None and self.known[3] != known[3]:
                self.frames = []
            self.known, self.bank, self.origin = known, {}, self.count
            self.generator = torch.Generator().manual_seed(0)
        self.frames.append([
            {"number": self.count + i, "k": 0, "sigmas": sigmas, "noise": noise, "conds": conds,
             "source": sources[i : i + 1].nan_to_num(0.0),
             "x": sources[i : i + 1] + sigmas[0] * noise.slot(0)}
            for i in range(f)
        ])  # fmt: skip
        self.count += f
        staged = {}
        for group in self.frames:
            for frame in group:
                self._step(frame, guidance, memory, n, staged)
        self._put(staged, kind)
        left = [g for g in self.frames if g[0]["k"] == len(g[0]["sigmas"]) - 1]
        if left:
            at = self.frames.index(left[-1])
            self.frames = self.frames[at + 1 :]
            return torch.cat([frame["x"] for frame in left[-1]])
        return None

    def _step(self, frame, guidance, memory, n, staged):
        mode, cfg, delta = guidance
        k, sigmas, x = frame["k"], frame["sigmas"], frame["x"]
        d = self._predict(frame, 0, memory, n, staged)
        u = None
        if mode == "full" and cfg != 1:
            u = self._predict(frame, 1, memory, n, staged)
        elif mode == "onetime-negative":
            if k == 0:
                frame["reference"] = self._predict(frame, 1, memory, n, staged)
            u = x - delta * (x - frame["reference"])
        elif mode == "self-negative":
            u = x - delta * (x - frame["source"])
        d = d if u is None else u + cfg * (d - u)
        last = k == len(sigmas) - 2 and sigmas[-1] == 0
        x = d if last else d + sigmas[k + 1] * frame["noise"].slot(k + 1)
        frame["x"], frame["k"] = x.nan_to_num(0.0), k + 1

    def _predict(self, frame, side, memory, n, staged):
        slot = (side, frame["k"])
        mine = len(frame["sigmas"]) - 1 == n
        kept = self.bank.get(slot, {}) if mine else {}
        writes = mine and (frame["number"] - self.origin) % memory["interval"] == 0
        wrote = {}

        def attend(block, q, k, v, heads, options):
            seen = kept.get(block, [])
            wrote[block] = [k[0], v[0], None]
            keys = torch.cat([k[0], *[one[0] for one in seen]])
            values = torch.cat([v[0], *[one[1] for one in seen]])
            return softmax(q[0], keys, values, heads)[None]

        def fuse(block, o, options):
            if block not in self.outs:
                return o
            seen = kept.get(block, [])
            if seen and memory["fuse"]:
                everything = torch.cat([one[2] for one in seen])
                o = fused(o[0], everything, memory["fuse"], memory["threshold"])[None]
            wrote[block][2] = o[0]
            return o

        sigma = torch.tensor([frame["sigmas"][frame["k"]]])
        given = {
            name: one(frame["x"], sigma) if callable(one) else one
            for name, one in frame["conds"][side].items()
        }
        told = {**self.options, "cond_or_uncond": [side], "sigmas": sigma}
        acting = self.acting
        with replaced(lambda block: acting is None or block in acting, attend, fuse):
            out = self.model.apply_model(frame["x"], sigma, transformer_options=told, **given)
        if writes:
            staged[slot] = wrote  # of a group, the last
        return out

    def _put(self, staged, kind):
        name, frames = kind
        if not staged:
            return
        orders = {}
        for wrote in staged.values():
            for k, _, _ in wrote.values():
                if name == "merged" and len(k) not in orders:
                    orders[len(k)] = torch.randperm(2 * len(k), generator=self.generator)
        for slot, wrote in staged.items():
            parts = [part for one in wrote.values() for part in one if part is not None]
            if not all(part.isfinite().all() for part in parts):
                continue
            for block, new in wrote.items():
                seen = self.bank.setdefault(slot, {}).setdefault(block, [])
                if name == "merged" and seen:
                    there = [i for i, part in enumerate(new) if part is not None]
                    both = merged([new[i] for i in there], [seen[0][i] for i in there],
                                  orders[len(new[0])])
                    seen[:] = [[*both, *[None] * (3 - len(both))]]
                else:
                    seen[:] = [*seen, new][-frames:]
