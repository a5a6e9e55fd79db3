"""A small chart of the loss curves."""

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 320, 200, 28


def draw_losses(curves, path):
    """Draw one panel per stage and write a PNG.

    Args:
        curves: {stage: [{"step": int, "seconds": float, "loss": float}, ...]}.
        path: where to write.
    """
    picture = Image.new("RGB", (WIDTH * len(curves), HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, curve) in enumerate(curves.items()):
        left, right = i * WIDTH + MARGIN, (i + 1) * WIDTH - 8
        top, bottom = MARGIN, HEIGHT - MARGIN
        draw.rectangle([left, top, right, bottom], outline="#999999")
        if not curve:
            continue
        high = max(point["loss"] for point in curve)
        last = curve[-1]
        dots = [
            (
                left + (right - left) * point["step"] / last["step"],
                bottom - (bottom - top) * point["loss"] / high,
            )
            for point in curve
        ]
        draw.line(dots, fill="#1f5fbf", width=2)
        draw.text((left, 8), f"{name}: loss {last['loss']:.3f} at the end", fill="black")
        draw.text((i * WIDTH + 2, top), f"{high:.2f}", fill="black")
        end = f"{last['step']} steps, {last['seconds']:.0f} s"
        draw.text((left, bottom + 6), end, fill="black")
    picture.save(path)
