"""Schedules found on the user's own model, as nodes."""

import contextlib
import logging
import math
import pathlib
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import torch

from ..engine.step_rules import STEP_RULES
from ..host.learning.hand_made import BESIDE, fitted, of_comfyui
from ..host.learning.study import Subject
from ..host.models import fingerprint, skips
from ..host.models.time_shift import shifted
from ..host.sampling.check import checked_latent, noise_table
from ..schedules import results
from ..schedules.architecture import Network
from ..schedules.find import PICTURES, SOLVERS, TEACHER, Ask, Model, evaluations, find
from ..schedules.optimized import SOLVERS as OPTIMIZED
from ..schedules.optimized import from_optimized
from ..schedules.timesteps import SPACINGS, from_strength
from ..trust.boundary import inside
from .compat import io, newer
from .plot import plotted

NEW = "find"
_OBJECTIVES = {"match the fine solution": TEACHER, "match pictures": PICTURES}


def folder() -> pathlib.Path:
    """Where results are kept: ComfyUI's user folder."""
    return pathlib.Path(folder_paths.get_user_directory()) / "livediffusion" / "schedules"


def kept(method: str) -> list[str]:
    """Names of the results of a method, the newest first."""
    found = []
    for file in folder().glob(f"{method}-*.json"):
        with contextlib.suppress(OSError):  # it may go while it is looked at
            found.append((-file.stat().st_mtime, file.name))
    return [name for _, name in sorted(found)]


def _shared(method: str) -> dict[str, io.Input]:
    """Inputs that both nodes have, by name."""
    return {
        "model": io.Model.Input("model", tooltip="What the steps are found for, with its LoRAs."),
        "positive": io.Conditioning.Input("positive", tooltip="A prompt as you will use it."),
        "negative": io.Conditioning.Input(
            "negative", optional=True, tooltip="Needed where cfg is not 1."
        ),
        "cfg": io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance scale, as you will use it. 1: none.",
        ),
        "solver": io.Combo.Input(
            "solver",
            options=list(SOLVERS),
            default="dpmpp_2m",
            tooltip="The sampler or step rule that will use the steps; they fit no other.",
        ),
        "steps": io.Int.Input(
            "steps",
            default=4,
            min=1,
            max=20,
            tooltip="Steps n, the number of slots of a stream.",
        ),
        "seed": io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Of the noise.",
        ),
        "samples": io.Int.Input(
            "samples",
            default=16,
            min=2,
            max=1024,
            tooltip="Pictures to learn on; as many again judge. More are slower and surer; "
            "with few you get the best hand-made steps unless others are better beyond doubt.",
        ),
        "strength": io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 starts from noise. Less starts from the pictures of latent, as a live "
            "stream does; use the strength of the stream.",
        ),
        "latent": io.Latent.Input(
            "latent",
            optional=True,
            tooltip="Gives the size; below strength 1 also the pictures to start from, a few that "
            "are like those to come. Without it: 512 x 512.",
        ),
        "result": io.Combo.Input(
            "result",
            options=[NEW, *kept(method)],
            default=NEW,
            tooltip="find: find the steps, or take them from the results kept if everything is the "
            "same. Else one of the files in ComfyUI's user folder, livediffusion/schedules, such "
            "as one that somebody gave you.",
        ),
    }


class LiveLearnedSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        shared = _shared("learned")
        first = ("model", "positive", "negative", "cfg", "solver", "steps", "samples")
        last = ("seed", "strength", "latent", "result")
        return io.Schema(
            node_id="LiveLearnedSteps",
            display_name="Live Learned Steps",
            category="live/schedules",
            description=(
                "Learns where your model's few steps should go, by matching a fine solution of 100 "
                "steps (after LD3). Takes minutes once; the result is kept."
            ),
            inputs=[
                *(shared[name] for name in first),
                io.Int.Input(
                    "iterations",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="Rounds of learning from each start. Ends by itself when done.",
                ),
                *(shared[name] for name in last),
                io.Boolean.Input(
                    "time_shift",
                    default=False,
                    tooltip="Also learn what time the model is told at each step, which often "
                    "gains more than the steps. Then the model output must be used with them.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas"),
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, with the learned time shift if there is one.",
                ),
            ],
            **newer(search_aliases=["ld3", "distill", "timesteps"]),
        )

    @classmethod
    def execute(
        cls, model, positive, cfg, solver, steps, samples, iterations, seed, strength, result,
        time_shift, negative=None, latent=None,
    ) -> io.NodeOutput:  # fmt: skip
        ask = Ask(
            "learned", solver, steps, strength, samples, iterations, seed, shift=time_shift
        )  # fmt: skip
        found = _steps(ask, model, positive, negative, cfg, latent, None, result)
        if found.shifts:
            calls = STEP_RULES[solver].levels(found.levels)
            if len(calls) != len(found.shifts):
                raise ValueError(
                    f"result: it shifts {len(found.shifts)} times, and {solver} calls the model "
                    f"{len(calls)} times. Choose another."
                )
            model = shifted(model, calls, found.shifts)
        return io.NodeOutput(torch.tensor(found.levels), model, ui=plotted(found))


class LiveSearchedSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        shared = _shared("searched")
        first = ("model", "positive", "negative", "cfg", "solver", "steps")
        last = ("seed", "samples", "strength", "latent", "result")
        return io.Schema(
            node_id="LiveSearchedSteps",
            display_name="Live Searched Steps",
            category="live/schedules",
            description=(
                "Searches where your model's few steps should go, by evolution (after "
                "AutoDiffusion): to match a fine solution, or the look of your own pictures. The "
                "two goals disagree: what matches pictures best strays from the fine solution. "
                "Takes minutes once; the result is kept."
            ),
            inputs=[
                *(shared[name] for name in first),
                io.Int.Input(
                    "population",
                    default=20,
                    min=4,
                    max=200,
                    tooltip="Schedules tried in each generation.",
                ),
                io.Int.Input(
                    "generations", default=12, min=1, max=200, tooltip="Rounds of the search."
                ),
                *(shared[name] for name in last),
                io.Combo.Input(
                    "objective",
                    options=list(_OBJECTIVES),
                    default="match the fine solution",
                    tooltip="match the fine solution: stay true to what the model would do in 100 "
                    "steps; right for live pictures. match pictures: look like yours on the whole "
                    "(Frechet distance of features); single pictures may stray. They disagree.",
                ),
                io.Latent.Input(
                    "pictures",
                    optional=True,
                    tooltip="For match pictures: your pictures, encoded; 32 and more. With the "
                    "other objective their distance is told as well.",
                ),
                io.Float.Input(
                    "skip_up_to",
                    optional=True,  # prompts from before there was such a thing go on to run
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=0.05,
                    tooltip="Share of the network's operations that the steps together leave out: "
                    "after the steps it is searched which blocks each can do without. Then the "
                    "model output must be used with them. 0: nothing. For SD1.5, SD2.1 and SDXL.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas"),
                io.Model.Output(
                    display_name="model",
                    tooltip="The model, with the blocks left out at each noise level if there are "
                    "such.",
                ),
            ],
            **newer(search_aliases=["autodiffusion", "evolution", "timesteps", "prune", "skip"]),
        )

    @classmethod
    def execute(
        cls, model, positive, cfg, solver, steps, population, generations, seed, samples, strength,
        result, objective, negative=None, latent=None, pictures=None, skip_up_to=0.0,
    ) -> io.NodeOutput:  # fmt: skip
        goal = _OBJECTIVES[objective]
        if goal == PICTURES and pictures is None:
            raise ValueError(
                "pictures: objective match pictures needs some. Connect VAE Encode with a batch of "
                "your pictures, or choose match the fine solution."
            )
        ask = Ask(
            "searched", solver, steps, strength, samples, generations, seed, population, goal=goal,
            skip=skip_up_to,
        )  # fmt: skip
        found = _steps(ask, model, positive, negative, cfg, latent, pictures, result)
        if found.skips:
            calls = STEP_RULES[solver].levels(found.levels)
            if len(calls) != len(found.skips):
                raise ValueError(
                    f"result: it leaves blocks out {len(found.skips)} times, and {solver} calls "
                    f"the model {len(calls)} times. Choose another."
                )
            model = skips.skipping(model, calls, found.skips)
        return io.NodeOutput(torch.tensor(found.levels), model, ui=plotted(found))


def _steps(ask, model, positive, negative, cfg, latent, pictures, result) -> results.Result:
    """What was found before, or is found now."""
    table, flow = noise_table(model)
    top = ask.top(table)
    # a link may bring a value of any type
    if not isinstance(result, str) or result != NEW:
        return _loaded(ask, result, top)
    if cfg != 1 and negative is None:
        raise ValueError(
            f"negative: guidance with cfg {cfg} needs a negative conditioning. Connect one, or set "
            "cfg to 1."
        )
    if ask.strength < 1 and latent is None:
        raise ValueError(
            f"latent: strength {ask.strength} starts from pictures. Connect VAE Encode with a few "
            "that are like those to come, or set strength to 1."
        )
    latents = checked_latent(model, latent) if latent is not None else _empty(model)
    if ask.strength == 1:
        latents = torch.zeros_like(latents[:1])
    shown = None if pictures is None else checked_latent(model, pictures)
    if shown is not None and len(shown) < 2:
        raise ValueError("pictures: one says nothing about all. Connect a batch of 32 or more.")
    network = _network(ask, model, positive, latents) if ask.skip else None
    bodies = frozenset() if network is None else frozenset(network.bodies)
    subject = Subject(model, positive, negative, cfg, latents, 2 * ask.samples, ask.seed, bodies)
    known = fingerprint.of_model(model)
    asked = {
        **vars(ask), "cfg": cfg, "model": known,
        "content": fingerprint.of([positive, negative, latents, shown]),
    }  # fmt: skip
    if not ask.skip:
        del asked["skip"]  # results from before there was such a thing are of the same key
    name = f"{ask.method}-{ask.solver}-{ask.steps}-{results.key(asked)}.json"
    before = _kept(folder() / name)
    if before is not None and before.complete:
        return before
    family = Family(table, flow, top, network)
    return _found(ask, subject, shown, known, asked, before, folder() / name, family)


class Family(NamedTuple):
    """What steps are found within.

    Attributes:
        table, flow, network: see schedules.find.Model.
        top: the first level.
    """

    table: torch.Tensor
    flow: bool
    top: float
    network: Network | None


def _network(ask, model, positive, latents) -> Network:
    """What of a model's network can be left out, and what it costs."""
    tokens = max((cond.shape[1] for cond, _ in positive if cond is not None), default=1)
    counted = skips.cost(model, latents.shape[-2:], tokens)
    network = Network(counted.bodies, counted.whole)
    if ask.skip > network.most:
        raise ValueError(
            f"skip_up_to: {ask.skip:.2f} is more than this model's blocks are of it. Set it to "
            f"{math.floor(100 * network.most) / 100:.2f} at most."
        )
    return network


def _found(ask, subject, shown, known, asked, before, path, family) -> results.Result:
    """Found now, and kept; what a cancelled run has found is kept too."""
    table, flow, top, network = family
    model = subject.model
    hands = _hand_made(model, ask, table, flow, top)
    bar = comfy.utils.ProgressBar(evaluations(ask, len(hands)))
    preview = latent_preview.get_previewer(model.load_device, model.model.latent_format)
    latest: results.Result | None = None

    def calls(done: int) -> None:
        # a message for each would flood the page
        if done - bar.current >= bar.total / 200:
            bar.update_absolute(min(done, bar.total - 1))

    def heard(found, errors) -> None:
        nonlocal latest
        curves = {name: hands[name] for name in BESIDE if name in hands}
        if found.hand_made[0] in hands:
            curves[found.hand_made[0]] = hands[found.hand_made[0]]
        levels, shifts, skipped = found.steps
        whole = {}
        if skipped:
            # the stage before, of this run or of the one that it goes on from
            of_steps = before if latest is None else latest
            curves, whole = of_steps.curves, of_steps.whole or of_steps.errors
        latest = results.Result(
            ask.method, ask.solver, levels, shifts, ask.goal, errors, found.hand_made[0], known,
            (found.done, found.total), asked, curves, results.today(),
            tuple(tuple(sorted(names)) for names in skipped),
            1 - network.saved(skipped) if skipped else 1.0, whole,
        )  # fmt: skip
        if preview is not None:
            image = preview.decode_latent_to_preview_image("JPEG", found.ends[:1].float())
            bar.update_absolute(bar.current, preview=image)

    def work(bench, clean, noise):
        x = bench.noised(clean, noise, top)
        scaled = None if shown is None else bench.scaled(shown)
        steps = None if before is None else before.steps
        find(Model(bench, bench.space, table, flow, network), x, ask, hands, scaled, steps, heard)

    try:
        subject.study(work, calls)
    except comfy.model_management.InterruptProcessingException:
        if latest is not None:
            _keep(latest, path)
        raise
    _keep(latest, path)
    bar.update_absolute(bar.total)
    return latest


def _hand_made(model, ask, table, flow, top) -> dict[str, tuple[float, ...]]:
    sampling = model.get_model_object("model_sampling")
    ours = {}
    for spacing in SPACINGS:
        try:
            ours[spacing] = from_strength(table, ask.steps, ask.strength, spacing, flow)
        except ValueError as why:  # not for this family, or too few levels
            logging.debug("LiveDiffusion: no spacing %s: %s", spacing, why)
    for solver in OPTIMIZED:
        ours[f"optimized {solver}"] = from_optimized(table, solver, ask.steps, ask.strength, flow)
    total = max(ask.steps, int(ask.steps / ask.strength))
    theirs = of_comfyui(sampling, flow, total)
    return fitted([*theirs, *ours.items()], ask.steps, top)


def _loaded(ask: Ask, name: Any, top: float) -> results.Result:
    """A file that the user chose."""
    path = inside(folder(), name, "result", "ComfyUI's user folder, livediffusion/schedules")
    try:
        result = results.load(path)
    except OSError as error:
        raise ValueError(f"result: {name} cannot be read ({error}). Choose another.") from error
    except ValueError as error:
        raise ValueError(f"result: {error} Choose another.") from error
    if (result.solver, len(result.levels) - 1) != (ask.solver, ask.steps):
        raise ValueError(
            f"result: {name} is for solver {result.solver} with {len(result.levels) - 1} steps. "
            "Set solver and steps to these."
        )
    if abs(result.levels[0] / top - 1) > 1e-3:
        raise ValueError(
            f"result: {name} starts at noise level {result.levels[0]:.4g}, and this model with "
            f"strength {ask.strength} at {top:.4g}. Use the strength it was made with"
            f" ({result.asked.get('strength', 'unknown')}) and a model of the same kind."
        )
    return result


def _kept(path: pathlib.Path) -> results.Result | None:
    try:
        return results.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logging.warning("LiveDiffusion: %s is not used: %s", path, error)
        return None


def _keep(result: results.Result, path: pathlib.Path) -> None:
    try:
        results.save(result, path)
    except OSError as error:
        logging.warning(
            "LiveDiffusion: the steps were found, but cannot be kept in %s: %s", path, error
        )


def _empty(model) -> torch.Tensor:
    form = model.get_model_object("latent_format")
    side = 512 // (getattr(form, "spacial_downscale_ratio", None) or 8)
    between = (1,) * (form.latent_dimensions - 2)
    return torch.zeros(1, form.latent_channels, *between, side, side)
