"""Builds one engine from an ONNX file."""

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..engine import Refused
from . import api, files


class Cancelled(Exception):
    """The build was told to stop."""


@dataclass(frozen=True)
class Job:
    """One build.

    Attributes:
        onnx: the file to build from; its weights may lie beside it.
        engine: the file to write.
        timing: cache of kernel timings, kept from build to build; used where the library measures.
        precision: fp32, fp16 or bf16.
        profile: for each input its min, opt and max shape; empty where all shapes are fixed.
        weights: names of the weights that are to be exchangeable; empty for none.
        targets: compute capabilities to build for, such as "8.9"; empty for the GPU here.
    """

    onnx: pathlib.Path
    engine: pathlib.Path
    timing: pathlib.Path
    precision: str
    profile: dict[str, tuple[tuple[int, ...], ...]]
    weights: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


# report(phase, step, steps) -> True to go on
Report = Callable[[str, int, int], bool]


def build(library: api.Library, job: Job, report: Report) -> None:
    """Build an engine.

    Args:
        library: that builds it.
        job: see Job.
        report: called with (phase, step, steps) where this library tells; what it returns says
            whether to go on.

    Raises:
        Refused: with what the library said.
        Cancelled: `report` has said so.
    """
    trt = library.module
    logger = library.listener()
    builder = trt.Builder(logger)
    network = builder.create_network(library.flags())
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(job.onnx)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        said = "; ".join(errors) or "no reason given"
        raise Refused(f"{library.called} cannot read the UNet: {said}")
    config = builder.create_builder_config()
    if job.targets:
        config.num_compute_capabilities = len(job.targets)
        for i, target in enumerate(job.targets):
            if not config.set_compute_capability(library.capability(target), i):
                raise Refused(f"{library.called} {library.version} does not build for {target}")
    if not library.typed:
        kind = {"fp16": "FP16", "bf16": "BF16"}.get(job.precision)
        if kind is not None:
            if not hasattr(trt.BuilderFlag, kind):
                raise Refused(f"TensorRT {trt.__version__} knows no {job.precision}; use fp16")
            config.set_flag(getattr(trt.BuilderFlag, kind))
    if job.weights:
        _refittable(library, network, config, job.weights)
    if job.profile:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in job.profile.items():
            profile.set_shape(name, tuple(low), tuple(usual), tuple(high))
        if config.add_optimization_profile(profile) < 0:
            raise Refused(f"{library.called} refuses these sizes: {job.profile}")
    if library.times:
        _timed(config, job.timing)
    asked = _Asked(report)
    if hasattr(trt, "IProgressMonitor") and hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(trt, asked)
    plan = builder.build_serialized_network(network, config)
    if library.times:
        # what was measured helps the next build, however this one ended
        files.write(job.timing, config.get_timing_cache().serialize())
    if asked.stopped:
        raise Cancelled
    if plan is None:
        raise Refused(f"{library.called} built nothing{api.because(logger)}")
    files.write(job.engine, plan)


def _timed(config: Any, file: pathlib.Path) -> None:
    known = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        # made by another version or GPU: measure anew
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _refittable(library: api.Library, network: Any, config: Any, weights: tuple[str, ...]) -> None:
    """One by one: the flag for all costs speed, and NVIDIA warns of wrong numbers with it."""
    flags = library.module.BuilderFlag
    if not (hasattr(flags, "REFIT_INDIVIDUAL") and hasattr(network, "mark_weights_refittable")):
        raise Refused(
            f"{library.called} {library.version} cannot exchange single weights: switch refit off, "
            "or install a newer one"
        )
    config.set_flag(flags.REFIT_INDIVIDUAL)
    for name in weights:
        if not network.mark_weights_refittable(name):
            raise Refused(f"{library.called} cannot exchange the weights {name}: switch refit off")


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
