"""The stages of training: pictures, autoencoder, latents, UNet with text encoder, export."""

import concurrent.futures
import copy
import json
import logging
import math
import pathlib
import time

import comfy.ldm.models.autoencoder
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.ops
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

from . import chart, loader, looks, scenes

LOOKS = list(looks.LOOKS)
POOL = 300  # pictures the autoencoder is trained on, each in all looks
SIGNAL = 2.0  # deviation of the latents: at 1, middle noise levels hide the layout of the picture
LATENT_NOISE = 0.05  # added in autoencoder training: the UNet's latents are never exact
CROSS = 0.6  # share of pairs whose noised latent is the scene in another look
CROSS_PHOTO = 0.75  # of those, share whose other look is the photo
CROSS_T = (150, 800)
DROP = 0.1  # empty prompt: keep the look the picture has
UNKNOWN = 0.05  # tokens replaced by the row of words that were never seen
CLOSED = ("out_layers.3", "proj_out", "to_out.0", "out_proj", "fc2", "out.2")
SMALL_SHARE = 0.5  # of the time on pieces of 16 x 16 latent pixels
CHARBONNIER = 0.2  # between squared error (blurry in few steps) and absolute error


def device():
    """CUDA if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw_pictures(count, work):
    """Pictures (count, 256, 256, 3) uint8 and the kind of each; kept in `work`."""
    path = work / "scenes.npz"
    if not path.exists():
        with concurrent.futures.ProcessPoolExecutor() as pool:
            drawn = list(pool.map(scenes.draw, range(count), chunksize=50))
        np.savez(path, pictures=np.stack([d[0] for d in drawn]), kinds=[d[1] for d in drawn])
    data = np.load(path)
    return data["pictures"][:count], [str(kind) for kind in data["kinds"][:count]]


def to_float(pictures):
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in 0..1 on the training device."""
    return torch.from_numpy(pictures).to(device()).movedim(-1, 1).float() / 255


def initialise(module):
    """Initial weights; ComfyUI's layers leave them unset because it always loads a checkpoint."""
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
            # residual branches start closed
            if name.endswith(CLOSED) or (name.endswith("conv2") and ".block" in name):
                layer.weight.data.mul_(0.05)
        elif isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.02)


class Clock:
    """Cosine learning rate over a wall-clock budget, and the record of the losses."""

    def __init__(self, name, minutes, rate, warmup=100):
        self.name, self.seconds, self.rate, self.warmup = name, minutes * 60, rate, warmup
        self.start = time.monotonic()
        self.step, self.recent, self.curve = 0, [], []

    @property
    def share(self):
        return (time.monotonic() - self.start) / self.seconds

    def set_rate(self, optimizer):
        decay = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(self.share, 1)))
        for group in optimizer.param_groups:
            group["lr"] = self.rate * decay * min(1, (self.step + 1) / self.warmup)

    def record(self, loss, every=50):
        self.step += 1
        self.recent.append(loss)
        if len(self.recent) == every:
            seconds = round(time.monotonic() - self.start, 1)
            mean = sum(self.recent) / every
            self.curve.append({"step": self.step, "seconds": seconds, "loss": round(mean, 5)})
            logging.info("%s step %d, %.0f s, loss %.4f", self.name, self.step, seconds, mean)
            self.recent = []


def autocast():
    """bfloat16 arithmetic: several times faster on CPUs with AVX512-BF16 or AMX, and on GPUs."""
    return torch.autocast(device().type, dtype=torch.bfloat16)


def picture_loss(output, target):
    """Absolute error at three sizes plus that of the gradients, for sharp edges."""
    loss = 0.0
    for _ in range(3):
        loss = loss + F.l1_loss(output, target)
        for axis in (2, 3):
            loss = loss + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return loss


def new_autoencoder():
    """An untrained autoencoder that takes and gives pixels."""
    model = comfy.ldm.models.autoencoder.AutoencoderKL(**loader.AUTOENCODER)
    initialise(model)
    loader.add_patches(model)
    return model.to(device())


def pieces(pool, rng, count=16):
    """Random 128-pixel pieces of a look pool (count, 3, 128, 128) in -1..1, on the 8-pixel grid."""
    batch = []
    for _ in range(count):
        y, x = rng.integers(0, 17, 2) * 8
        picture = pool[rng.integers(len(pool)), rng.integers(len(LOOKS))]
        batch.append(picture[y : y + 128, x : x + 128])
    return to_float(np.stack(batch)) * 2 - 1


def train_autoencoder(pool, minutes, rng):
    """Train on a look pool.

    Returns:
        (AutoencoderKL, curve), latents normalised to mean 0 and deviation 1 per channel.
    """
    model = new_autoencoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    clock = Clock("autoencoder", minutes, 2e-3)
    while clock.share < 1:
        target = pieces(pool, rng)
        with autocast():
            z = model.encode(target).float()
            output = model.decode(z + LATENT_NOISE * torch.randn_like(z))
        spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        loss = picture_loss(output.float(), target) + 0.02 * spread
        step(clock, optimizer, loss, model.parameters())
    normalise_latents(model.train(False), pool)
    return model, clock.curve


def refine_decoder(pool, path, minutes, rng):
    """Train the decoder of the exported autoencoder further; the latents stay as they are.

    Returns:
        (AutoencoderKL, curve)
    """
    model = new_autoencoder()
    model.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(path).items()})
    model.requires_grad_(False)
    parameters = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    clock = Clock("decoder", minutes, 1e-3)
    while clock.share < 1:
        target = pieces(pool, rng)
        with autocast():
            z = model.encode(target).float()
            output = model.decode(z + LATENT_NOISE * torch.randn_like(z))
        step(clock, optimizer, picture_loss(output.float(), target), parameters)
    return model, clock.curve


def step(clock, optimizer, loss, parameters):
    """One optimiser step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    clock.set_rate(optimizer)
    optimizer.step()
    clock.record(float(loss.detach()))


def look_pool(pictures):
    """The pictures in all looks, uint8 (count, looks, 256, 256, 3)."""
    pool = np.empty((len(pictures), len(LOOKS), *pictures.shape[1:]), np.uint8)
    for i in range(0, len(pictures), 8):
        x = to_float(pictures[i : i + 8])
        for k, look in enumerate(looks.LOOKS.values()):
            y = (look(x) * 255 + 0.5).clamp(0, 255).byte()
            pool[i : i + 8, k] = y.movedim(1, -1).cpu().numpy()
    return pool


@torch.inference_mode()
def encode(model, pictures):
    """Latents (B, 8, 32, 32) float32 of uint8 pictures."""
    x = to_float(pictures) * 2 - 1
    with autocast():
        return model.encode(x).float()


def normalise_latents(model, pool):
    """Fold mean and deviation of each latent channel into the 1 x 1 convolutions around it."""
    z = torch.cat([encode(model, pool[i, :]) for i in range(0, len(pool), 6)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = loader.LATENT_CHANNELS
    with torch.no_grad():
        # decoder first: it still sees the old latents, z = std * new + mean
        weight = model.post_quant_conv.weight[:, :, 0, 0]
        model.post_quant_conv.bias += weight @ mean
        model.post_quant_conv.weight *= std.view(1, n, 1, 1)
        model.quant_conv.bias[:n] = (model.quant_conv.bias[:n] - mean) / std
        model.quant_conv.weight[:n] /= std.view(n, 1, 1, 1)
        # the encoder is deterministic: fix the log variance it does not use
        model.quant_conv.weight[n:] = 0
        model.quant_conv.bias[n:] = -8


def latent_figures(model, pictures):
    """Scale of the latents and the linear map to RGB that ComfyUI's previews use."""
    pool = look_pool(pictures)
    z = torch.cat([encode(model, row) for row in pool]).cpu()
    x = np.concatenate(list(pool)).astype(np.float32)
    rgb = F.avg_pool2d(torch.from_numpy(x).movedim(-1, 1) / 127.5 - 1, 8)
    a = z.movedim(1, -1).flatten(0, 2)
    a = torch.cat([a, torch.ones(len(a), 1)], 1)
    solution = torch.linalg.lstsq(a, rgb.movedim(1, -1).flatten(0, 2)).solution
    rounded = [[round(v, 4) for v in row] for row in solution.tolist()]
    scale = round(SIGNAL / float(z.std()), 4)
    rows = [[round(v / scale, 4) for v in row] for row in rounded[:-1]]
    return {"scale_factor": scale, "rgb_factors": rows, "rgb_bias": rounded[-1]}


def all_latents(model, pictures, scale):
    """Scaled latents of every picture in every look, float16 (count, looks, 8, 32, 32)."""
    latents = []
    for i in range(0, len(pictures), 8):
        pool = look_pool(pictures[i : i + 8])
        z = encode(model, pool.reshape(-1, *pool.shape[2:])) * scale
        latents.append(z.half().cpu().view(*pool.shape[:2], *z.shape[1:]))
    return torch.cat(latents)


class TextEncoder(torch.nn.Module):
    """ComfyUI's text model with the few embedding rows that training needs.

    The last row stands for every word that is not in the vocabulary.
    """

    def __init__(self):
        super().__init__()
        self.tokenizer = loader.Tokenizer()
        text = loader.TextModel(dtype=torch.float32)
        self.model = text.transformer.text_model.requires_grad_(True)
        words = {t for p in looks.all_prompts() for t in self.tokens(p)}
        self.ids = sorted(words)
        self.index = {token: i for i, token in enumerate(self.ids)}
        initialise(self.model)
        del self.model.embeddings.token_embedding
        self.rows = torch.nn.Parameter(torch.randn(len(self.ids) + 1, loader.CONTEXT) * 0.5)

    def tokens(self, text):
        """77 token ids of a prompt."""
        return [token for token, *_ in self.tokenizer.tokenize_with_weights(text)["l"][0]]

    def load(self, state):
        """Take the weights of an exported text encoder with the same vocabulary."""
        prefix = "text_model."
        layers = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        self.model.load_state_dict(layers)
        if state["ids"].tolist() != self.ids:
            raise ValueError("the exported text encoder has another vocabulary")
        self.rows.data.copy_(torch.cat([state["rows"], state["unknown"][None]]))

    def forward(self, prompts):
        """Prompts (list of B strings) to context (B, 77, 64)."""
        where = torch.tensor([[self.index[t] for t in self.tokens(p)] for p in prompts])
        if self.training:
            fixed = (where == self.index[49406]) | (where == self.index[49407])
            where[(torch.rand(where.shape) < UNKNOWN) & ~fixed] = len(self.ids)
        x = self.rows[where.to(self.rows.device)]
        x = x + self.model.embeddings.position_embedding.weight
        length = x.shape[1]
        for layer in self.model.encoder.layers:
            # ComfyUI's own forward adds in place, which autograd refuses
            attention, h = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (
                p(h).view(len(x), length, attention.heads, -1).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.model.final_layer_norm(x)


def alphas():
    """Square roots of the signal and noise variance of each of SD's 1000 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)
    return signal.sqrt().float(), (1 - signal).sqrt().float()


def sample_batch(latents, kinds, size, rng, crop):
    """Draw training pairs, as pieces of `crop` latent pixels (at multiples of 4, the grid looks').

    Returns:
        source and target latents (B, 8, 32, 32), prompts, t (B,), cross (B,) bool.
    """
    source, target, prompts, steps, crossed = [], [], [], [], []
    for _ in range(size):
        scene, look = int(rng.integers(len(latents))), int(rng.integers(len(LOOKS)))
        cross, other = rng.random() < CROSS, look
        if cross:
            other = 0 if rng.random() < CROSS_PHOTO else int(rng.integers(len(LOOKS)))
        if rng.random() < DROP:
            prompts.append("")
            look = other
        else:
            prompts.append(looks.prompt(LOOKS[look], kinds[scene], rng))
        steps.append(int(rng.integers(*CROSS_T)) if cross else int(rng.integers(1000)))
        crossed.append(cross)
        y, x = rng.integers(0, (latents.shape[-1] - crop) // 4 + 1, 2) * 4
        piece = latents[scene, :, :, y : y + crop, x : x + crop]
        source.append(piece[other])
        target.append(piece[look])
    pair = torch.stack(source).float(), torch.stack(target).float()
    return (*(z.to(device()) for z in pair), prompts, torch.tensor(steps), torch.tensor(crossed))


def diffusion_loss(unet, text, batch, signal, noise_level):
    """v-prediction loss; for cross pairs v is the one that leads from x_t to the other look."""
    source, target, prompts, t, cross = batch
    a = signal[t].view(-1, 1, 1, 1).to(source.device)
    s = noise_level[t].view(-1, 1, 1, 1).to(source.device)
    x = a * source + s * torch.randn_like(source)
    with autocast():
        context = text(prompts).float()
        v = unet(x, t.to(x.device).float(), context=context).float()
    error = v - (a * x - target) / s
    # a cross pair at little noise asks for a large v: weigh it by its error in the picture
    error = torch.where(cross.view(-1, 1, 1, 1).to(x.device), error * s, error)
    return ((error.square() + CHARBONNIER**2).sqrt() - CHARBONNIER).mean()


class Average:
    """Exponential moving average of the weights; short at first."""

    def __init__(self, modules, decay=0.998):
        self.modules, self.decay, self.count = modules, decay, 0
        self.copies = [copy.deepcopy(m).train(False).requires_grad_(False) for m in modules]

    @torch.no_grad()
    def update(self):
        self.count += 1
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        for module, average in zip(self.modules, self.copies, strict=True):
            mine, theirs = list(average.parameters()), list(module.parameters())
            torch._foreach_lerp_(mine, theirs, 1 - keep)


def train_diffusion(latents, kinds, options, rng, save):
    """Train UNet and text encoder together; `save(unet, text, curve)` is called now and then."""
    unet = openaimodel.UNetModel(
        **loader.UNET, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    initialise(unet)
    text = TextEncoder()
    if options.resume:
        out = pathlib.Path(options.out)
        unet.load_state_dict(safetensors.torch.load_file(out / "unet.safetensors"))
        text.load(safetensors.torch.load_file(out / "text.safetensors"))
    unet, text = unet.to(device()).train(), text.to(device()).train()
    average = Average([unet, text])
    parameters = [p for p in [*unet.parameters(), *text.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    clock = Clock("diffusion", options.minutes, 1e-3)
    signal, noise_level = alphas()
    saved = time.monotonic()
    while clock.share < 1:
        # small pieces first: four times as many pairs for the same time
        small = clock.share < SMALL_SHARE
        size, crop = (2 * options.batch, 16) if small else (options.batch, 32)
        batch = sample_batch(latents, kinds, size, rng, crop)
        step(clock, optimizer, diffusion_loss(unet, text, batch, signal, noise_level), parameters)
        average.update()
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            save(*average.copies, clock.curve)
    save(*average.copies, clock.curve)


def write(state, path):
    """Write safetensors in one move, so that a reader never sees half a file."""
    part = path.with_suffix(".part")
    safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(path)


def half(state):
    """Copy of a state dict in fp16 on the CPU."""
    return {k: v.detach().half().cpu().contiguous() for k, v in state.items()}


def export(state, path):
    """Write a state dict as fp16."""
    write(half(state), path)


def export_text(text, path):
    """Write the text encoder: its layers, and the embedding rows of the words it knows."""
    state = {f"text_model.{k}": v for k, v in text.model.state_dict().items()}
    state["text_projection.weight"] = torch.eye(loader.CONTEXT)
    state["rows"], state["unknown"] = text.rows[:-1], text.rows[-1].clone()
    write({**half(state), "ids": torch.tensor(text.ids, dtype=torch.int32)}, path)


def run(options):
    """All stages in order; pictures and latents found in the work folder are not made again."""
    out, work = pathlib.Path(options.out), pathlib.Path(options.work)
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    pictures, kinds = draw_pictures(options.scenes, work)
    logging.info("%d pictures", len(pictures))
    cache, coder = work / "latents.pt", out / "autoencoder.safetensors"
    if not cache.exists():
        pool = look_pool(pictures[:POOL])
        model, curve = train_autoencoder(pool, options.autoencoder_minutes, rng)
        export(model.state_dict(), coder)
        figures = latent_figures(model, pictures[-64:])
        (out / "latents.json").write_text(json.dumps(figures), encoding="utf-8")
        latents = all_latents(model, pictures, figures["scale_factor"])
        torch.save({"latents": latents, "curve": curve}, cache)
    stored = torch.load(cache, weights_only=True)
    curves = {"autoencoder": stored["curve"]}
    logging.info("latents %s", tuple(stored["latents"].shape))

    def save(unet, text, curve):
        export(unet.state_dict(), out / "unet.safetensors")
        export_text(text, out / "text.safetensors")
        curves["diffusion"] = curve
        (out / "loss.json").write_text(json.dumps(curves), encoding="utf-8")

    train_diffusion(stored["latents"], kinds, options, rng, save)
    pool = look_pool(pictures[:POOL])
    model, curves["decoder"] = refine_decoder(pool, coder, options.decoder_minutes, rng)
    export(model.state_dict(), coder)
    (out / "loss.json").write_text(json.dumps(curves), encoding="utf-8")
    chart.draw_losses(curves, out / "loss.png")
