"""Judge the embedded model on held-out real pictures: the client of `python run.py evaluate`.

Everything goes through the pack's own nodes: Live Encode, Live Strength, Live RCFG Guider, the
stream, Live Decode. Prints tables; writes figures.json and sheets of pictures to look at.
"""

import argparse
import json
import pathlib
import statistics
import time

from packed import ROOT, comfyui, pack_module

STEPS, STRENGTH, CFG, DELTA = 2, 0.5, 1.0, 0.3
TEMPLATE = {"steps": 2, "strength": 0.5, "cfg": 1.2, "delta": 0.6}  # the workflows' settings
PROMPTS = {
    "photo": "photo", "ink": "ink drawing", "neon": "neon night", "watercolor": "watercolor",
    "mosaic": "mosaic tiles", "thermal": "thermal camera", "blueprint": "blueprint",
    "poster": "pop art poster", "sunset": "golden sunset", "oil": "oil painting",
    "pencil": "pencil sketch", "comic": "comic",
}  # fmt: skip
FACES = ("ink", "watercolor", "oil", "comic", "pencil")
FILM = "ltxv_image_to_video-1"
SHOWN = (FILM, "video_ltx2_3_id_lora-1", "video_ltx2_i2v_distilled-1")  # films of the README
SHOWN_LOOKS = ("watercolor", "ink", "neon", "poster", "oil")
SHOWN_FRAMES, SHOWN_SIDE = 14, 156
SIZES = ((192, 192), (256, 256), (384, 256), (512, 512))  # width, height


def options():
    parser = argparse.ArgumentParser(prog="run.py evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--comfyui", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=pathlib.Path, help="folder (default: the pack's own)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("output/evaluation"))
    parser.add_argument("--count", type=int, default=24, help="pictures of the tables")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count: 1 or more")
    return args


class Judge:
    """The model, the pack's nodes around it, and held-out pictures.

    Args:
        weights: folder, None for the pack's own. count: pictures of the tables.
    """

    def __init__(self, weights, count):
        loader = pack_module("demo.loader")
        if weights:
            loader.WEIGHTS = weights.resolve()
        began = time.perf_counter()
        self.model, self.clip, self.vae = loader.load()
        self.load_seconds = time.perf_counter() - began
        for name in ("pictures", "looks", "measure", "pairs", "filters"):
            setattr(self, name, pack_module(f"demo.{name}"))
        self.files = self.pictures.split(self.pictures.fetched(self.pictures.CACHE))[1]
        self.names, self.x = self._held_out(count)

    def middle(self, name, side=256):
        """The middle frame of a held-out file, (1, 3, side, side) in 0..1."""
        from PIL import Image

        with Image.open(self.files[name]) as picture:
            picture.seek(getattr(picture, "n_frames", 1) // 2)
            return self.tensor(self.pictures.centre(picture.convert("RGB"), side))

    def film(self, name, frames):
        """Frames of a held-out film, (len(frames), 3, 256, 256) in 0..1."""
        from PIL import Image

        with Image.open(self.files[name]) as film:
            taken = []
            for i in frames:
                film.seek(i % film.n_frames)
                taken.append(self.tensor(self.pictures.centre(film.convert("RGB"))))
        return self._cat(taken)

    @staticmethod
    def tensor(pixels):
        import numpy as np
        import torch

        return torch.from_numpy(np.array(pixels)).movedim(-1, 0)[None].float() / 255

    def _held_out(self, count):
        import torch

        worth = []
        for name in sorted(self.files):
            x = self.middle(name)
            if self.pictures.worth((x[0].movedim(0, -1) * 255).numpy().astype("uint8")):
                worth.append((name, x))
        picked = [worth[i * len(worth) // count] for i in range(min(count, len(worth)))]
        return [name for name, _ in picked], torch.cat([x for _, x in picked])

    def targets(self, x):
        """{look: (B, 3, H, W)}."""
        parts = [self.looks.every(one[None]) for one in x]
        return {key: self._cat([p[:, i] for p in parts]) for i, key in enumerate(self.looks.LOOKS)}

    @staticmethod
    def _cat(parts):
        import torch

        return torch.cat(parts)

    def restyle(self, x, prompt, steps=STEPS, strength=STRENGTH, cfg=CFG, delta=DELTA, seed=0):
        """Pictures through the nodes of the clip workflow, (B, 3, H, W) in 0..1."""
        sampling, frames, schedules = (
            pack_module(f"nodes.{name}") for name in ("sampling", "frames", "schedules")
        )
        stream = pack_module("host.sampling.stream")
        positive, negative = (
            self.clip.encode_from_tokens_scheduled(self.clip.tokenize(p)) for p in (prompt, "")
        )
        sigmas = schedules.LiveStrength.execute(self.model, steps, strength, "uniform t").args[0]
        guider = sampling.LiveRCFGGuider.execute(
            self.model, positive, cfg, delta, "self-negative", negative
        ).args[0]
        latent = frames.LiveEncode.execute(x.movedim(1, -1), self.vae).args[0]["samples"]
        settings = stream.Settings(tuple(sigmas.tolist()), "lcm", seed, drain=True)
        out = stream.Stream().run(guider, latent, settings)
        return frames.LiveDecode.execute({"samples": out}, self.vae).args[0].movedim(-1, 1)


def row(name, figures):
    return f"{name:<16}" + "".join(f"{figures[k]:>11.3f}" for k in figures)


def mean(rows):
    return {k: statistics.mean(r[k] for r in rows) for k in rows[0]}


def by_look(judge, out, report):
    """Each look beside its filter: n = 2 and 4 at cfg 1, and the templates' settings."""
    targets, results = judge.targets(judge.x), {}
    flat = [judge.measure.psnr(t.mean((2, 3), keepdim=True).expand_as(t), t).mean()
            for t in targets.values()]  # fmt: skip
    results["constant"] = {"psnr": float(sum(flat) / len(flat))}
    report(f"the best constant picture: PSNR {results['constant']['psnr']:.2f} dB")
    settings = {"n = 2": {}, "n = 4": {"steps": 4}, "templates": TEMPLATE}
    for name, values in settings.items():
        report(f"\n{name:<16}{'edge':>11}{'sharpness':>11}{'PSNR':>11}{'SSIM':>11}")
        table, pictures = {}, {}
        for look, prompt in PROMPTS.items():
            pictures[look] = judge.restyle(judge.x, prompt, **values)
            table[look] = judge.measure.compare(pictures[look], targets[look])
            report(row(prompt, table[look]))
        table["mean"] = mean(list(table.values()))
        report(row("mean", table["mean"]))
        results[name] = table
        some = range(0, len(judge.x), max(1, len(judge.x) // 8))
        columns = [judge.x, *(v for k, v in pictures.items() if k != "photo")]
        sheet([[c[i] for c in columns] for i in some], out / f"{name.replace(' = ', '')}.png")
        if name == "n = 2":
            pairs = [v for k in targets if k != "photo" for v in (pictures[k], targets[k])]
            sheet([[c[i] for c in (judge.x, *pairs)] for i in some], out / "beside_targets.png")
    return results


def faces(judge, out, report):
    """Edges in the box of each held-out face, against the filter's and against the input's."""
    boxes = json.loads((ROOT / "demo" / "held_faces.json").read_text(encoding="utf-8"))
    x = judge._cat([judge.middle(name) for name in boxes])
    targets, table = judge.targets(x), {}
    report(f"\n{'faces':<16}{'to target':>11}{'to input':>11}{'its target':>11}")
    rows = [[*x]]
    for look in FACES:
        y = judge.restyle(x, PROMPTS[look])
        rows.append([*y])
        parts = {"target": [], "input": [], "target to input": []}
        for i, (left, top, right, bottom) in enumerate(boxes.values()):
            face = [v[i : i + 1, :, top:bottom, left:right] for v in (y, targets[look], x)]
            pairs = {"target": (0, 1), "input": (0, 2), "target to input": (1, 2)}
            for key, (a, b) in pairs.items():
                parts[key].append(float(judge.measure.edge_correlation(face[a], face[b])))
        table[look] = {k: statistics.mean(v) for k, v in parts.items()}
        table[look]["least"] = min(parts["target"])
        report(row(PROMPTS[look], table[look]))
    sheet(rows, out / "faces.png")
    return table


def webcam(judge, out, report):
    """The fall of PSNR to the clean picture's target with noise, JPEG and bad light."""
    import torch

    clean, targets = judge.x[::3], judge.targets(judge.x[::3])
    generator = torch.Generator().manual_seed(0)
    pairs, filters = judge.pairs, judge.filters

    def camera(x):
        noise = torch.randn(x.shape, generator=generator)
        return pairs.jpeg((x + 0.03 * noise).clamp(0, 1), 60)

    yellow = filters.colour(clean, 1.08, 0.97, 0.68)
    inputs = {"clean": clean, "noise and JPEG": camera(clean), "dim": camera(0.6 * clean),
              "yellow": camera((clean * yellow).clamp(0, 1))}  # fmt: skip
    table = {}
    for name, x in inputs.items():
        rows = {look: float(judge.measure.psnr(judge.restyle(x, p), targets[look]).mean())
                for look, p in PROMPTS.items()}  # fmt: skip
        table[name] = {"psnr": statistics.mean(rows.values()), **rows}
        fall = table["clean"]["psnr"] - table[name]["psnr"]
        report(f"{name:<16}{table[name]['psnr']:>11.2f} dB, a fall of {fall:.2f}")
    sheet([[*x[:8]] for x in inputs.values()], out / "webcam_inputs.png")
    return table


def flicker(judge, out, report):
    """Change from frame to frame where the film stands still: output against filter."""
    x = judge.film(FILM, range(4, 20))
    still = ((x[1:] - x[:-1]).abs().amax(1, keepdim=True) < 0.015).float()

    def change(v):
        return float(((v[1:] - v[:-1]).abs() * still).sum() / (3 * still.sum())) * 255

    targets, table = judge.targets(x), {}
    report(f"\n{'flicker':<16}{'output':>11}{'filter':>11}{'ratio':>11}   (of 255)")
    rows = [[*x[::2]]]
    for look, prompt in PROMPTS.items():
        y = judge.restyle(x, prompt)
        rows.append([*y[::2]])
        figures = {"output": change(y), "filter": change(targets[look])}
        figures["ratio"] = figures["output"] / max(figures["filter"], 1e-6)
        table[look] = figures
        report(row(prompt, figures))
    table["mean"] = mean(list(table.values()))
    report(row("mean", table["mean"]))
    sheet(rows, out / "film.png")
    return table


def dials(judge, out, report):
    """What strength, cfg and delta do, and prompts that name no look."""
    x, table = judge.x[::4], {}
    looks = [k for k in PROMPTS if k != "photo"]

    def moved(look, **values):
        return float((judge.restyle(x, PROMPTS[look], **values) - x).abs().mean()) * 255

    report(f"\n{'moved, of 255':<16}" + "".join(f"{s / 10:>8}" for s in range(1, 10)))
    for look in looks:
        table[look] = [moved(look, strength=s / 10) for s in range(1, 10)]
        report(f"{PROMPTS[look]:<16}" + "".join(f"{v:>8.1f}" for v in table[look]))
    kept = {p: float((judge.restyle(x, p) - x).abs().mean()) * 255
            for p in ("", "zebra", "a cinematic shot of a wizard, 8k", "xyzzy qwerty")}  # fmt: skip
    for prompt, value in kept.items():
        report(f"{prompt!r:<36} moves the photo by {value:.1f} of 255")
    guided = {f"cfg {cfg}, delta {delta}": statistics.mean(
        moved(look, cfg=cfg, delta=delta) for look in looks[:6])
        for cfg, delta in ((1.0, 0.3), (1.4, 0.3), (1.4, 1.0), (1.8, 0.3))}  # fmt: skip
    for name, value in guided.items():
        report(f"{name:<36} moves six looks by {value:.1f} of 255")
    return {"strength": table, "kept": kept, "guidance": guided}


def sizes(judge, out, report):
    """PSNR to the filter at other sizes."""
    import torch.nn.functional as F

    table, some = {}, judge.names[::3]
    for width, height in SIZES:
        x = judge._cat([judge.middle(name, 512) for name in some])
        crop = x[:, :, : 512 * height // max(width, height), : 512 * width // max(width, height)]
        x = F.interpolate(crop, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)
        targets = judge.targets(x)
        table[f"{width} x {height}"] = statistics.mean(
            float(judge.measure.psnr(judge.restyle(x, p), targets[look]).mean())
            for look, p in PROMPTS.items()
        )
        report(f"{width} x {height}: {table[f'{width} x {height}']:.2f} dB")
    return table


def speed(judge, out, report):
    """Milliseconds of a whole frame, encoder to decoder, on this machine."""
    frames, table = judge.x.repeat(2, 1, 1, 1)[:24], {"load, s": judge.load_seconds}
    for steps in (1, 2, 4):
        judge.restyle(frames[:6], "watercolor", steps=steps)
        runs = []
        for _ in range(3):
            began = time.perf_counter()
            judge.restyle(frames, "watercolor", steps=steps)
            runs.append(time.perf_counter() - began)
        # a clip of k frames has k + n - 1 ticks, not all of them full
        table[f"n = {steps}, ms"] = 1000 * statistics.median(runs) / (len(frames) + steps - 1)
    for name, value in table.items():
        report(f"{name}: {value:.2f}")
    return table


def showcase(judge, out, report):
    """The moving picture at the top of the README, with the templates' settings."""
    import torch.nn.functional as F

    rows = []
    for name in SHOWN:
        x = judge.film(name, range(6, 6 + 2 * SHOWN_FRAMES, 2))
        looks = [judge.restyle(x, PROMPTS[look], **TEMPLATE) for look in SHOWN_LOOKS]
        side = (SHOWN_SIDE, SHOWN_SIDE)
        rows.append([F.interpolate(v, size=side, mode="area") for v in (x, *looks)])
    frames = [picture([[cell[i] for cell in row] for row in rows]) for i in range(SHOWN_FRAMES)]
    frames += frames[-2:0:-1]  # there and back, so that it has no seam
    path = out / "looks.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=90, loop=0,
                   quality=55, method=6)  # fmt: skip
    report(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return {"bytes": path.stat().st_size}


PARTS = {"looks": by_look, "faces": faces, "webcam": webcam, "flicker": flicker, "dials": dials,
         "sizes": sizes, "speed": speed, "showcase": showcase}  # fmt: skip


def picture(rows):
    """Rows of pictures (3, H, W) in 0..1 as one of Pillow's."""
    import torch
    from PIL import Image

    whole = torch.cat([torch.cat([*row], 2) for row in rows], 1)
    return Image.fromarray((whole * 255 + 0.5).clamp(0, 255).byte().movedim(0, -1).numpy())


def sheet(rows, path):
    """Rows of pictures as one file."""
    picture(rows).save(path)


def main():
    args = options()
    comfyui(args.comfyui)
    import torch

    args.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        judge = Judge(args.weights, args.count)
        print(f"{len(judge.names)} held-out pictures, lcm, seed 0, self-negative")
        figures = {part: PARTS[part](judge, args.out, print) for part in args.only}
    path = args.out / "figures.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**old, **figures}, indent=1) + "\n", encoding="utf-8")
    print(f"- {path}\n- the sheets beside it: look at them")


if __name__ == "__main__":
    main()
