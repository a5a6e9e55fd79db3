"""Pictures of calm to look at: contact sheets with slices of time, and films side by side."""

import pathlib

import torch
import torch.nn.functional as F
from calm_figures import warped
from PIL import Image, ImageDraw
from torch import Tensor

HEAD, MARGIN = 14, 150  # pixels for words above and beside
COLUMNS = 4


def picture(x: Tensor) -> Image.Image:
    """[3, H, W] in 0..1."""
    return Image.fromarray((x * 255 + 0.5).clamp(0, 255).byte().movedim(0, -1).numpy())


def slice_of_time(frames: Tensor) -> Tensor:
    """The middle line of each frame, one below the other, [3, W, W]: what stands still, or moves
    evenly, makes straight lines; what flickers or sticks to the screen makes others."""
    side = frames.shape[-1]
    lines = frames[:, :, frames.shape[-2] // 2].movedim(0, 1)
    return F.interpolate(lines[None], (side, side), mode="nearest")[0]


def sheet(
    rows: dict[str, Tensor], path: pathlib.Path, side: int = 192, flow: Tensor | None = None
) -> None:
    """A row for each way, by name: some frames, what changes beside the motion, the slice.

    Args:
        rows: [T, 3, H, W] each, in 0..1 or as bytes.
        flow: [T - 1, 2, H, W], calm_clips.Clip's; None where it is not known, or nothing moves.
    """
    rows = {name: shown(frames) for name, frames in rows.items()}
    count = len(next(iter(rows.values())))
    some = [round(i * (count - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    whole = Image.new("RGB", (MARGIN + (COLUMNS + 2) * side, len(rows) * side + HEAD), "white")
    draw = ImageDraw.Draw(whole)
    change = "change of a frame, x 8" if flow is None else "change beside motion, x 8"
    words = [*(f"frame {i}" for i in some), change, "middle line over time"]
    for column, text in enumerate(words):
        draw.text((MARGIN + column * side + 3, 1), text, fill="black")
    for row, (name, frames) in enumerate(rows.items()):
        before, after = frames[count // 2 - 1 : count // 2 + 1]
        if flow is not None:
            before = warped(before[None], flow[count // 2 - 1])[0]
        change = (8 * (after - before).abs()).clamp(0, 1)
        cells = [*frames[some], change, slice_of_time(frames)]
        draw.text((4, HEAD + row * side + 4), name.replace(", ", ",\n"), fill="black")
        for column, cell in enumerate(cells):
            small = F.interpolate(cell[None], (side, side), mode="area")[0]
            whole.paste(picture(small), (MARGIN + column * side, HEAD + row * side))
    whole.save(path)


def film(
    rows: list[dict[str, Tensor]], path: pathlib.Path, side: int = 176, quality: int = 60
) -> int:
    """Rows of films side by side with their names above, as an animated WebP; its bytes.

    Args:
        rows: of columns by name, [T, 3, H, W] as bytes each (`kept`); all as long.
    """
    names = list(rows[0])
    frames = []
    for t in range(len(rows[0][names[0]])):
        whole = Image.new("RGB", (len(names) * side, HEAD + len(rows) * side), "white")
        draw = ImageDraw.Draw(whole)
        for column, name in enumerate(names):
            draw.text((column * side + 3, 1), name, fill="black")
            for row, cells in enumerate(rows):
                cell = F.interpolate(shown(cells[name][t][None]), (side, side), mode="area")[0]
                whole.paste(picture(cell), (column * side, HEAD + row * side))
        frames.append(whole)
    # there and back, so that it has no seam
    frames += frames[-2:0:-1]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=80, loop=0,
                   quality=quality, method=4)  # fmt: skip
    return path.stat().st_size


def shown(frames: Tensor) -> Tensor:
    """In 0..1, of what may be bytes."""
    return frames if frames.is_floating_point() else frames.float() / 255


def kept(frames: Tensor) -> Tensor:
    """As bytes, so that many fit into memory."""
    return (frames * 255 + 0.5).clamp(0, 255).to(torch.uint8)
