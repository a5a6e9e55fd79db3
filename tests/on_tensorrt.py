"""Engines of TensorRT built from MODELs, and streams of them beside the UNet itself."""

import tiny
from helping import SIGMAS


def built(patcher, rows=4, size=64, precision="fp32", tokens=8, **more):
    from livediffusion.host.models import tensorrt

    asked = tensorrt.wish(patcher, size, size, rows, tokens, False, precision, **more)
    return tensorrt.build(patcher, asked, "x", lambda *told: None)


def loaded(path, patcher):
    from livediffusion.compiled.trt import files
    from livediffusion.host.models import tensorrt

    said = []
    sidecar = files.check(path, tensorrt.here)
    made = tensorrt.run_on(patcher, path, sidecar, said.append)
    return made, said


def engine(made):
    from livediffusion.host.models.engines import engine_of

    return engine_of(made)


def beside(
    plain, made, runs, steady, mode="self-negative", frames=1, size=8, near=1e-4, sigmas=SIGMAS[2:]
):
    """Two streams, of the UNet itself and of the engine; the last runs are the engine's alone."""
    import pairs
    from livediffusion.host.sampling.stream import Stream

    streams = Stream(frames), Stream(frames)
    guiders = [pairs.guider(each, mode) for each in (plain, made)]
    for i in range(runs):
        before = engine(made).ran, engine(made).fell_back
        wanted, ours = (
            stream.run(guider, tiny.latents(frames, i, size), pairs.settings(sigmas))
            for stream, guider in zip(streams, guiders, strict=True)
        )
        assert tiny.rms(ours, wanted) <= near, i
        if i >= runs - steady:
            assert engine(made).reason is None
            assert (engine(made).ran > before[0], engine(made).fell_back) == (True, before[1])
