"""OpenVINO as an engine: the processor of a laptop, Intel's GPUs and NPUs."""
