"""Pictures to train on: the previews that ComfyUI's template packages bring (MIT licence).

PACKAGES names them with their versions, so that everyone trains on and judges by the same ones.
Files named in held_out.txt, and their before-and-after sisters, are never trained on.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import random
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from . import filters, looks

PREFIX = "comfyui_workflow_templates_media_"
PACKAGES = {"api": "0.3.84", "assets_01": "0.1.30", "image": "0.3.160", "other": "0.3.229",
            "video": "0.3.101"}  # fmt: skip
HERE = pathlib.Path(__file__).resolve().parent
CACHE = pathlib.Path.home() / ".cache" / "livediffusion" / "previews"
SIDE = 256
FRAMES = 10  # most crops of one file
AT_ONCE = 4


def held_out():
    """Names (without .webp) of the files that are kept for judging."""
    return (HERE / "held_out.txt").read_text(encoding="utf-8").split()


def stem(name):
    """name-1 and name-2 are before and after: one scene."""
    return name.rsplit("-", 1)[0]


def installed():
    """The folder of the packages in this environment; None where one is missing or another."""
    for name, version in PACKAGES.items():
        try:
            if importlib.metadata.version(PREFIX + name) != version:
                return None
        except importlib.metadata.PackageNotFoundError:
            return None
    origin = importlib.util.find_spec(PREFIX + "image").submodule_search_locations[0]
    return pathlib.Path(origin).parent


def fetched(cache):
    """The folder of the packages: this environment's, else one below `cache` (pathlib.Path).

    Raises:
        subprocess.CalledProcessError: they are not here and pip could not fetch them.
    """
    here = installed()
    if here is not None:
        return here
    wanted = [f"{PREFIX}{name}=={version}" for name, version in PACKAGES.items()]
    place = cache / hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:16]
    if not place.is_dir():
        part = place.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(part)]
        subprocess.run([*command, *wanted], check=True)
        part.rename(place)
    return place


def files(folder):
    """All previews of the packages in a folder, {name: path}.

    Raises:
        FileNotFoundError: there is none.
    """
    found = {p.stem: p for p in sorted(pathlib.Path(folder).glob(f"{PREFIX}*/**/*.webp"))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no previews of ComfyUI's template packages")
    return found


def split(folder):
    """(to train on, held out), each {name: path}."""
    found = files(folder)
    kept = {stem(name) for name in held_out()}
    train = {n: p for n, p in found.items() if stem(n) not in kept}
    return train, {n: p for n, p in found.items() if stem(n) in kept}


def frames_of(picture, count, rng):
    """Up to `count` frames of an animation, in order, as RGB pictures."""
    total = getattr(picture, "n_frames", 1)
    for i in sorted(rng.sample(range(total), min(count, total))):
        picture.seek(i)
        yield picture.convert("RGB")


def centre(picture, side=SIDE):
    """The middle of a picture as (side, side, 3) uint8."""
    w, h = picture.size
    short = min(w, h)
    box = ((w - short) / 2, (h - short) / 2, (w + short) / 2, (h + short) / 2)
    return np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS, box=box))


def crop(picture, rng):
    """A random piece of a picture, perhaps mirrored, as (256, 256, 3) uint8."""
    short = min(picture.size)
    side = int(short * rng.uniform(0.55, 1.0)) if short > SIDE else short
    x, y = (rng.randint(0, length - side) for length in picture.size)
    box = (x, y, x + side, y + side)
    piece = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(piece)


def worth(piece):
    """Neither a logo nor black or empty."""
    y = piece.astype(np.float32).mean(2)
    return y.std() > 18 and 20 < y.mean() < 235 and (y < 12).mean() < 0.5 and (y > 248).mean() < 0.6


def crops(found, count, seed):
    """At most `count` pieces (N, 256, 256, 3) uint8 of files, in random order."""
    pieces = []
    for name in sorted(found):
        # a file's pieces depend on nothing but its name and the seed
        rng = random.Random(f"{seed} {hashlib.sha256(name.encode()).hexdigest()}")
        with Image.open(found[name]) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                some = [crop(frame, rng) for frame in frames_of(picture, FRAMES, rng)]
            else:
                whole = picture.convert("RGB")
                number = 4 if max(whole.size) <= 512 else FRAMES
                some = [crop(whole, rng) for _ in range(number)]
        pieces += [piece for piece in some if worth(piece)]
    random.Random(seed).shuffle(pieces)
    return np.stack(pieces[:count])


def relight(x, rng):
    """Other light for pictures (B, 3, H, W) in 0..1, half of them: exposure, white, contrast."""
    out = []
    for one in x:
        if rng.random() < 0.5:
            one = one ** float(np.exp(rng.uniform(-0.45, 0.45)))
            white = torch.tensor([1 + rng.uniform(-0.12, 0.12) for _ in range(3)])
            one = filters.saturate((one * white.view(3, 1, 1)).clamp(0, 1)[None],
                                   rng.uniform(0.55, 1.2))[0]  # fmt: skip
            one = ((one - 0.5) * rng.uniform(0.7, 1.15) + 0.5).clamp(0, 1)
            if rng.random() < 0.3:
                one = filters.blur(one[None], round(rng.uniform(0.4, 1.0), 1))[0]
        out.append(one)
    return torch.stack(out)


def to_bytes(x):
    """0..1 to uint8."""
    return (x * 255 + 0.5).clamp(0, 255).byte()


@torch.inference_mode()
def _looks(job):
    index, pieces, seed = job
    torch.set_num_threads(1)
    x = torch.from_numpy(pieces).movedim(-1, 1).float() / 255
    x = relight(x, random.Random(f"{seed} light {index}"))
    return index, to_bytes(looks.every(x)).numpy()


def prepare(folder, work, count, seed, report):
    """The pieces in all looks, uint8 (N, looks, 3, 256, 256) in a memory map; kept in `work`.

    Args:
        folder: where the packages are. work: folder (pathlib.Path) for the result.
        count: most pieces. seed: int. report: function of (done, all).
    """
    path = work / f"looks_{seed}_{count}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    pieces = crops(split(folder)[0], count, seed)
    shape = (len(pieces), len(looks.LOOKS), 3, SIDE, SIDE)
    part = path.with_suffix(".part.npy")
    out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
    jobs = [(i, pieces[i : i + AT_ONCE], seed) for i in range(0, len(pieces), AT_ONCE)]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for index, block in pool.map(_looks, jobs):
            out[index : index + len(block)] = block
            report(index + len(block), len(pieces))
    out.flush()
    part.rename(path)
    return np.load(path, mmap_mode="r")
