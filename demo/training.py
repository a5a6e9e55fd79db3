"""Training of UNet and text encoder, and their export; train.py is its command."""

import copy
import json
import math
import time

import comfy.ops
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import chart, network, pairs, pictures
from .text import TextEncoder, head_start, initialise

CLOSED = ("out_layers.3", "proj_out", "to_out.0", "out_proj", "fc2", "net.2", "out.2")
RATE, MUON_RATE, MAP_RATE = 1e-3, 1e-2, 8e-3
MAP_SPREAD = 0.25  # of the map of positions at the start: from zero it wakes up late
WARMUP, LAST = 40, 0.02  # steps; share of the learning rate at the end
ROLLOUT = 0.42  # share of a batch that goes on from the step before
SMALL = 0.25  # of the time on small pieces: more steps while everything is wrong anyway
SIZES = ((256, 8), (256, 8), (256, 8), (192, 14))  # piece and batch, taken in turn
FIRST, TURN = (128, 16), 40  # before that; steps until the next size
EMA = 0.999
ROUND = 0.03  # errors below it count squared
GRADIENT = (0.6, 0.5)  # at full and half size
SHARPNESS = 0.7
FINE = {"neon": 1.5, "blueprint": 1.5, "thermal": 1.5, "sunset": 1.5, "ink": 1.2, "poster": 1.2}
HEAD_START = 20.0  # seconds of a long run
SAVE = 150.0  # seconds between checkpoints


def autocast(device):
    """bfloat16: several times faster on CPUs with AVX512-BF16 or AMX, and on GPUs."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def sigmas(device):
    """Noise levels (1000,) of SD's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)
    return ((1 - signal) / signal).sqrt().float().to(device)


class Muon:
    """Momentum, orthogonalised: Jordan et al., "Muon" (2024), Newton-Schulz of degree 5.

    For the inner matrices and convolutions (as out x rest); torch's own takes no convolutions.
    """

    def __init__(self, parameters, rate):
        self.parameters, self.rate = parameters, rate
        self.momentum = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, share):
        """One step at `share` of the rate."""
        rate, groups = self.rate * share, {}
        torch._foreach_lerp_(self.momentum, [p.grad for p in self.parameters], 0.05)
        for p, m in zip(self.parameters, self.momentum, strict=True):
            update = torch.lerp(p.grad, m, 0.95).flatten(1)
            groups.setdefault(tuple(update.shape), []).append((p, update))
        for shape, members in groups.items():
            x = torch.stack([update for _, update in members]).bfloat16()
            tall = shape[0] > shape[1]
            x = x.mT if tall else x
            x = x / (x.float().norm(dim=(1, 2), keepdim=True).bfloat16() + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = (x.mT if tall else x).float() * max(1, shape[0] / shape[1]) ** 0.5
            for (p, _), update in zip(members, x, strict=True):
                p.mul_(1 - 0.02 * rate).add_(update.reshape(p.shape), alpha=-rate)


def nearby(x):
    """How strong the edges are in each 4 x 4 pixels: (B, 3, H, W) to (B, 3, H / 4, W / 4)."""
    return sum(F.avg_pool2d(x.diff(dim=axis).abs(), 4, ceil_mode=True) for axis in (2, 3))


def picture_loss(output, target, fine):
    """Error (B,) of pixels, of their gradients at two sizes, of a small copy, and of sharpness.

    Sharpness is how strong edges are nearby, wherever they are: without it what is uncertain is
    blurred. The rest is linear in the difference, so that is taken once.

    Args:
        output, target: (B, 3, H, W). fine: (B,) weight of the gradients.
    """
    difference = output - target
    zero = difference.new_zeros(())

    def error(d):
        # absolute, and squared near 0; a kernel of its own forwards and backwards
        return F.smooth_l1_loss(d, zero.expand_as(d), reduction="none", beta=ROUND).mean((1, 2, 3))

    loss = error(difference) + SHARPNESS * fine * error(nearby(output) - nearby(target))
    for weight in GRADIENT:
        slopes = error(difference.diff(dim=2)) + error(difference.diff(dim=3))
        loss = loss + weight * fine * slopes
        difference = F.avg_pool2d(difference, 2)
    return loss + 0.5 * error(difference)


class Trainer:
    """Everything that a checkpoint holds.

    Args:
        pictures: uint8 (N, looks, 3, 256, 256). minutes: of training. seed: int.
        device: torch.device. report: function of a line.
    """

    def __init__(self, pictures, minutes, seed, device, report):
        torch.manual_seed(seed)
        self.device, self.seconds, self.report = device, 60 * minutes, report
        net = network.Network(
            **network.UNET, dtype=torch.float32, operations=comfy.ops.disable_weight_init
        ).requires_grad_(True)
        initialise(net, CLOSED)
        net.out[2].weight.data.mul_(4)
        tile = net.input_blocks[0][1].map
        torch.nn.init.normal_(tile, std=MAP_SPREAD)
        self.text, self.net = TextEncoder().to(device), net.to(device)
        self.net.to(memory_format=torch.channels_last)
        self.pairs = pairs.Pairs(pictures, seed, device)
        self.sigmas = sigmas(device)
        outer = ("input_blocks.0", "out.", "time_embed", "label_emb")
        inner = [p for n, p in net.named_parameters() if p.ndim >= 2 and not n.startswith(outer)]
        self.muon = Muon(inner, MUON_RATE)
        taken = {id(p) for p in [*inner, tile]}
        self.parameters = [p for p in [*net.parameters(), *self.text.parameters()]
                           if p.requires_grad]  # fmt: skip
        rest = [p for p in self.parameters if id(p) not in taken]
        groups = [{"params": rest, "base": RATE},
                  {"params": [tile], "base": MAP_RATE, "weight_decay": 0.0}]  # fmt: skip
        self.adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.averages = [copy.deepcopy(m).requires_grad_(False) for m in (self.net, self.text)]
        self.steps, self.spent, self.shown, self.curve = 0, 0.0, 0, []
        self._carried, self._recent, self._named = None, [], False

    def state(self):
        """What `resume` takes."""
        parts = {"net": self.net, "text": self.text, "net_average": self.averages[0],
                 "text_average": self.averages[1], "adamw": self.adamw}  # fmt: skip
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "muon": self.muon.momentum, "steps": self.steps, "spent": self.spent,
            "shown": self.shown, "curve": self.curve, "ids": self.text.ids,
            "random": (self.pairs.rng.getstate(), self.pairs.numpy.bit_generator.state,
                       self.pairs.generator.get_state(), torch.get_rng_state()),
        }  # fmt: skip

    def resume(self, state):
        """Go on from a checkpoint.

        Raises:
            ValueError: it was made with other prompts.
        """
        if state["ids"] != self.text.ids:
            raise ValueError("the checkpoint's prompts are others: prompts.py has changed")
        for name, part in (("net", self.net), ("text", self.text), ("adamw", self.adamw),
                           ("net_average", self.averages[0]),
                           ("text_average", self.averages[1])):  # fmt: skip
            part.load_state_dict(state[name])
        self.muon.momentum = [m.to(self.device) for m in state["muon"]]
        for name in ("steps", "spent", "shown", "curve"):
            setattr(self, name, state[name])
        first, second, third, fourth = state["random"]
        self.pairs.rng.setstate(first)
        self.pairs.numpy.bit_generator.state = second
        self.pairs.generator.set_state(third)
        torch.set_rng_state(fourth)

    def start_from(self, folder):
        """Begin with exported weights (a folder, pathlib.Path), with a fresh optimiser.

        Raises:
            ValueError: they know other prompts.
        """
        net = {
            k: v.float()
            for k, v in safetensors.torch.load_file(folder / "unet.safetensors").items()
        }
        for name in ("out.2.weight", "out.2.bias"):
            net[name] = net[name] / network.SCALE
        text = safetensors.torch.load_file(folder / "text.safetensors")
        if text.pop("ids").tolist() != self.text.ids:
            raise ValueError(f"the prompts of {folder} are others than those of prompts.py")
        rows = torch.cat([text.pop("rows"), text.pop("unknown")[None]]).float()
        prefix = "text_model."
        layers = {
            k.removeprefix(prefix): v.float() for k, v in text.items() if k.startswith(prefix)
        }
        for a, b in ((self.net, self.text), self.averages):
            a.load_state_dict(net)
            b.model.load_state_dict(layers)
            b.rows.data.copy_(rows)
        self._named = True

    def run(self, save):
        """Train until the minutes are over; `save` is called every SAVE seconds."""
        if not self.steps and not self._named:
            rng = np.random.default_rng(0)
            head_start(self.text, min(HEAD_START, 0.1 * self.seconds), rng, self.report)
        saved = last = time.monotonic()
        while self.spent < self.seconds:
            self._step()
            now = time.monotonic()
            self.spent += now - last
            last = now
            if now - saved > SAVE:
                save()
                saved = last = time.monotonic()
        save()

    def _size(self):
        if self.spent < SMALL * self.seconds:
            return FIRST
        return SIZES[self.steps // TURN % len(SIZES)]

    def _batch(self):
        size, count = self._size()
        carried = self._carried
        if carried is None or carried.source.shape[-1] != size:
            return self.pairs.draw(count, size)
        return self.pairs.draw(count - len(carried.t), size).join(carried)

    def _step(self):
        batch = self._batch()
        count = len(batch.t)
        z = F.pixel_unshuffle(batch.source, network.PATCH) * network.SCALE
        sigma = self.sigmas[batch.t].view(-1, 1, 1, 1)
        noised = z + sigma * batch.noise
        x = noised / (sigma**2 + network.SIGMA_DATA**2).sqrt()
        # torch's fused attention is slow backwards at these sizes
        with autocast(self.device), sdpa_kernel(SDPBackend.MATH):
            context, pooled = self.text(batch.prompts)
            output = self.net(x, batch.t.float(), context=context.float(), y=pooled.float())
        output = F.pixel_shuffle(output.float(), network.PATCH)
        fine = output.new_tensor([FINE.get(kind, 1.0) for kind in batch.kinds])
        losses = picture_loss(output, batch.target, fine)
        self.adamw.zero_grad(set_to_none=True)
        for p in self.muon.parameters:
            p.grad = None
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimise()
        seen = F.pixel_shuffle(noised, network.PATCH) / network.SCALE
        self._carried = self.pairs.go_on(batch, output.detach(), seen, round(ROLLOUT * count))
        self.shown += count * (batch.source.shape[-1] / pictures.SIDE) ** 2
        self._record(losses.detach(), batch.kinds)

    def _optimise(self):
        share = min(self.spent / self.seconds, 1)
        decay = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * share))
        rate = min(1, (self.steps + 1) / WARMUP) * decay
        for group in self.adamw.param_groups:
            group["lr"] = group["base"] * rate
        self.adamw.step()
        self.muon.step(rate)
        self.steps += 1
        keep = min(EMA, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, module in zip(self.averages, (self.net, self.text), strict=True):
                torch._foreach_lerp_(
                    list(average.parameters()), list(module.parameters()), 1 - keep
                )

    def _record(self, losses, kinds, every=50):
        self._recent += zip(kinds, losses.tolist(), strict=True)
        if self.steps % every:
            return
        mean = sum(loss for _, loss in self._recent) / len(self._recent)
        by = {}
        for kind, loss in self._recent:
            by.setdefault(kind, []).append(loss)
        self.curve.append({
            "step": self.steps, "seconds": round(self.spent, 1), "loss": round(mean, 5),
            "shown": round(self.shown), "by": {k: round(sum(v) / len(v), 4) for k, v in by.items()},
        })  # fmt: skip
        self._recent = []
        rate = self.shown / max(self.spent, 1e-6)
        self.report(
            f"step {self.steps}, {self.spent / 60:.1f} of {self.seconds / 60:.0f} min, "
            f"{rate:.1f} pictures/s, loss {mean:.4f}"
        )


def export(trainer, out):
    """Write the averaged weights as fp16 safetensors, and the loss curve.

    Args:
        trainer: Trainer. out: folder (pathlib.Path).
    """
    net, text = trainer.averages
    state = {k: v.detach().cpu().float() for k, v in net.state_dict().items()}
    for name in ("out.2.weight", "out.2.bias"):
        state[name] = state[name] * network.SCALE  # pixels to latents
    _write(state, out / "unet.safetensors")
    state = {f"text_model.{k}": v for k, v in text.model.state_dict().items()}
    state["text_projection.weight"] = torch.eye(network.CONTEXT)
    state["rows"], state["unknown"] = text.rows[:-1], text.rows[-1]
    _write(state, out / "text.safetensors", ids=torch.tensor(text.ids, dtype=torch.int32))
    curve = [{k: v for k, v in point.items() if k != "by"} for point in trainer.curve]
    (out / "loss.json").write_text(json.dumps(trainer.curve, indent=0) + "\n", encoding="utf-8")
    chart.draw_losses({"UNet and text": curve}, out / "loss.png")


def _write(state, path, **more):
    half = {k: v.detach().cpu().half().contiguous().clone() for k, v in state.items()}
    safetensors.torch.save_file({**half, **more}, path, metadata={"format": "pt"})
