"""The least time of one UNet forward at 512 x 512, as the project models the hardware.

For each matmul-type operation the larger of its arithmetic, in whole waves of tiles, and its bytes;
everything else free. The best of several tile shapes, no split-K, fp16 with fp32 accumulation.
"""

# milliseconds by rows; H200: 790 TFLOP/s, 4.3 TB/s; 4090: 165.2 TFLOP/s, 1.008 TB/s
_SD = {
    "H200": {1: 1.71, 2: 2.74, 3: 3.54, 4: 4.59, 8: 8.75},
    "4090": {1: 7.93, 2: 12.7, 3: 16.5, 4: 21.3, 8: 40.7},
}
_SDXL = {
    "H200": {1: 3.17, 2: 5.61, 4: 9.24},
    "4090": {1: 14.7, 2: 26.0, 4: 42.8},
}
_FLOORS = {"sd15": _SD, "sd-turbo": _SD, "sdxl-turbo": _SDXL}


def floors(network: str, gpu: str) -> dict[int, float]:
    """Milliseconds by rows; empty where the GPU is not known.

    Args:
        network: a name in networks.PUBLISHED.
        gpu: as torch names it.
    """
    return next((known for name, known in _FLOORS[network].items() if name in gpu), {})
