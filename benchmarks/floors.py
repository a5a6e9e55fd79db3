"""The least time of one UNet forward at 512 x 512, as the project models the hardware.

For each matmul-type operation the larger of its arithmetic, in whole waves of tiles over the
multiprocessors, and its bytes; everything else free. The best of six tile shapes, no split-K, fp16
with fp32 accumulation; attention, one kernel, without waves.
"""

import math
from typing import NamedTuple

import torch
from networks import PUBLISHED, TOKENS
from torch.utils._python_dispatch import TorchDispatchMode


class Hardware(NamedTuple):
    """Arithmetic in TFLOP/s, memory in TB/s, multiprocessors."""

    tflops: float
    tbps: float
    processors: int


# H200: both figures measured by others; H100 SXM: the same arithmetic, its data sheet's memory
KNOWN = {
    "H200": Hardware(790, 4.3, 132),
    "H100": Hardware(790, 3.35, 132),
    "4090": Hardware(165.2, 1.008, 128),
}
# milliseconds by rows, as `modelled` gives them
_SD = {
    "H200": {1: 1.71, 2: 2.74, 3: 3.54, 4: 4.59, 8: 8.75},
    "H100": {1: 1.73, 2: 2.78, 3: 3.60, 4: 4.66, 8: 8.90},
    "4090": {1: 7.93, 2: 12.7, 3: 16.5, 4: 21.3, 8: 40.7},
}
_SDXL = {
    "H200": {1: 3.17, 2: 5.61, 4: 9.24},
    "H100": {1: 3.24, 2: 5.65, 4: 9.32},
    "4090": {1: 14.7, 2: 26.0, 4: 42.8},
}
_FLOORS = {"sd15": _SD, "sd-turbo": _SD, "sdxl-turbo": _SDXL}
_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))


def floors(network: str, gpu: str) -> dict[int, float]:
    """Milliseconds by rows; empty where the GPU is not known.

    Args:
        network: a name in networks.PUBLISHED.
        gpu: as torch names it.
    """
    return next((known for name, known in _FLOORS[network].items() if name in gpu), {})


def modelled(network: str, rows: int, hardware: Hardware) -> float:
    """Milliseconds of a forward of so many rows."""
    return 1000 * sum(work.seconds(hardware) for work in works(network, rows))


class Work(NamedTuple):
    """`count` products of [m, k] and [k, n], and how many numbers are read and written."""

    m: int
    n: int
    k: int
    count: int
    numbers: int
    attention: bool = False

    def seconds(self, hardware: Hardware) -> float:
        peak, many = hardware.tflops * 1e12, hardware.processors
        if self.attention:  # two products
            busy = 4 * self.m * self.n * self.k * self.count / peak
        else:
            busy = min(
                math.ceil(self.count * math.ceil(self.m / a) * math.ceil(self.n / b) / many)
                * 2 * a * b * self.k * many / peak
                for a, b in _TILES
            )  # fmt: skip
        return max(busy, 2 * self.numbers / (hardware.tbps * 1e12))


def works(network: str, rows: int) -> list[Work]:
    """The matmul-type operations of a forward, none of which is carried out."""
    from diffusers import UNet2DConditionModel

    config, added = PUBLISHED[network], {}
    # inference_mode would hand over convolutions and attention undivided
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"):
        unet = UNet2DConditionModel(**config, sample_size=64)
        if "addition_embed_type" in config:
            added = {"text_embeds": torch.empty(rows, 1280), "time_ids": torch.empty(rows, 6)}
        prompt = torch.empty(rows, TOKENS, config["cross_attention_dim"])
        latents = torch.empty(rows, 4, 64, 64)
        with _Products() as seen:
            unet(latents, torch.ones(rows), prompt, added_cond_kwargs=added)
    return seen.found


class _Products(TorchDispatchMode):
    """Notes them. Without a device attention is two products in a row, which count as one."""

    def __init__(self):
        super().__init__()
        self.found: list[Work] = []
        self._scores: Work | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            x, weight = args[:2]
            batch, _, height, width = out.shape
            shape = batch * height * width, weight.shape[0], weight[0].numel(), 1
            self._add(shape, x, weight, out)
        elif name in ("mm", "addmm"):
            a, b = args[-2:]
            self._add((a.shape[0], b.shape[1], a.shape[1], 1), a, b, out)
        elif name == "bmm":
            self._attend(*args)
        return out

    def _add(self, shape: tuple[int, int, int, int], *tensors: torch.Tensor) -> None:
        self.found.append(Work(*shape, sum(t.numel() for t in tensors)))

    def _attend(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if self._scores is None:
            self._scores = Work(a.shape[1], b.shape[2], a.shape[2], a.shape[0], 0)
            return
        m, n, k, count, _, _ = self._scores
        self.found.append(Work(m, n, k, count, 2 * count * (m + n) * k, True))
        self._scores = None
