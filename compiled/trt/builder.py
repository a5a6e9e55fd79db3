"""Builds one engine from an ONNX file."""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine import Refused


class Cancelled(Exception):
    """The build was told to stop."""


@dataclass(frozen=True)
class Job:
    """One build.

    Attributes:
        onnx: the file to build from; its weights may lie beside it.
        engine: the file to write.
        timing: cache of kernel timings, kept from build to build.
        precision: fp32, fp16 or bf16.
        profile: for each input its min, opt and max shape; empty where all shapes are fixed.
        weights: names of the weights that are to be exchangeable; empty for none.
    """

    onnx: pathlib.Path
    engine: pathlib.Path
    timing: pathlib.Path
    precision: str
    profile: dict[str, tuple[tuple[int, ...], ...]]
    weights: tuple[str, ...] = ()


# report(phase, step, steps) -> True to go on
Report = Callable[[str, int, int], bool]


def build(trt: Any, job: Job, report: Report) -> None:
    """Build an engine.

    Args:
        trt: the tensorrt module.
        job: see Job.
        report: called with (phase, step, steps) where this TensorRT tells; what it returns says
            whether to go on.

    Raises:
        Refused: with what TensorRT said.
        Cancelled: `report` has said so.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    strong = hasattr(flags, "STRONGLY_TYPED")
    wanted = [name for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name)]
    # the numbers behind the names differ between versions
    network = builder.create_network(sum(1 << int(getattr(flags, name)) for name in wanted))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job.onnx)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise Refused(f"TensorRT cannot read the UNet: {'; '.join(errors) or 'no reason given'}")
    config = builder.create_builder_config()
    if not strong:
        kind = {"fp16": "FP16", "bf16": "BF16"}.get(job.precision)
        if kind is not None:
            if not hasattr(trt.BuilderFlag, kind):
                raise Refused(f"TensorRT {trt.__version__} knows no {job.precision}; use fp16")
            config.set_flag(getattr(trt.BuilderFlag, kind))
    if job.weights:
        _refittable(trt, network, config, job.weights)
    if job.profile:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in job.profile.items():
            profile.set_shape(name, tuple(low), tuple(usual), tuple(high))
        if config.add_optimization_profile(profile) < 0:
            raise Refused(f"TensorRT refuses these sizes: {job.profile}")
    known = job.timing.read_bytes() if job.timing.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        # made by another version or GPU: measure anew
        config.set_timing_cache(config.create_timing_cache(b""), False)
    asked = _Asked(report)
    if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(trt, asked)
    plan = builder.build_serialized_network(network, config)
    # what was measured helps the next build, however this one ended
    _write(job.timing, config.get_timing_cache().serialize())
    if asked.stopped:
        raise Cancelled
    if plan is None:
        raise Refused("TensorRT built nothing; its messages are in the log above")
    _write(job.engine, plan)


def _refittable(trt: Any, network: Any, config: Any, weights: tuple[str, ...]) -> None:
    """One by one: the flag for all costs speed, and NVIDIA warns of wrong numbers with it."""
    if not (
        hasattr(trt.BuilderFlag, "REFIT_INDIVIDUAL") and hasattr(network, "mark_weights_refittable")
    ):
        raise Refused(
            f"TensorRT {trt.__version__} cannot exchange single weights: switch refit off, or "
            "install a newer one"
        )
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in weights:
        network.mark_weights_refittable(name)


class _Asked:
    """Remembers that it was told to stop."""

    def __init__(self, report: Report):
        self._report = report
        self.stopped = False

    def __call__(self, phase: str, step: int, steps: int) -> bool:
        self.stopped = not self._report(phase, step, steps) or self.stopped
        return not self.stopped


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.steps = {}

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.steps[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name, step):
            return report(phase_name, step + 1, self.steps.get(phase_name, step + 1))

        def phase_finish(self, phase_name):
            steps = self.steps.pop(phase_name, 1)
            report(phase_name, steps, steps)

    return Monitor()


def _write(path: pathlib.Path, data: Any) -> None:
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
