"""Which GPUs an engine is built for: the node's words, and the compute capabilities behind them."""

HERE = "this GPU"

# what TensorRT for RTX builds for, oldest first, and a name that people know; no 9.0 and no 10.x
GPUS = {
    "7.5": "RTX 20",
    "8.0": "A100",
    "8.6": "RTX 30",
    "8.9": "RTX 40",
    "12.0": "RTX 50",
    "12.1": "GB10",
}
# NVIDIA advises against Turing (7.5) in one engine with newer GPUs, where it may cost those speed
SETS: dict[str, tuple[str, ...] | None] = {
    HERE: None,
    "RTX 30 and newer": tuple(c for c in GPUS if c != "7.5"),
    "RTX 20 and newer": tuple(GPUS),
    "RTX 20": ("7.5",),
    "RTX 30": ("8.6",),
    "RTX 40": ("8.9",),
    "RTX 50": ("12.0",),
}
NO_BF16 = "7.5"


def named(capabilities: tuple[str, ...]) -> str:
    """Compute capabilities for people: "RTX 30 (8.6), RTX 40 (8.9)"."""
    return ", ".join(f"{GPUS[c]} ({c})" if c in GPUS else c for c in capabilities)
