"""Steps and solvers against each other: the tables of docs/schedules.md.

    COMFYUI_PATH=... python benchmarks/schedules.py [part ...]

Parts: solvers, mixtures, hands, learned, few, shifted and searched run where the exact answer is
known (tests/grid.py), demo and skipped on the bundled model; without a name all of them. Prints a
table and one line of JSON for each; ends with an error if a bar of the project is missed.
"""

import argparse
import importlib.util
import json
import logging
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SEARCH = 20 * 60  # seconds of one core that a search for what can be left out may take
PARTS = ("solvers", "mixtures", "hands", "learned", "few", "shifted", "searched", "demo", "skipped")


# a rule's steps for a number of calls
RULES = {
    "pfdiff-1_1": lambda calls: 2 * calls - 1,
    "pfdiff-2_1": lambda calls: 3 * calls - 2,
    "pfdiff-3_1": lambda calls: 4 * calls - 3,
    "deis": lambda calls: calls,
    "dpmpp_2m": lambda calls: calls,
    "unipc": lambda calls: calls,
}


def _error(name: str, family: str, rule: str, levels) -> tuple[float, int]:
    """RMSE to the exact solution on 256 noises, and the number of calls."""
    import analytic
    from livediffusion.engine.sequential import walk
    from livediffusion.engine.step_rules import STEP_RULES, Course

    course = Course(tuple(levels.tolist()), STEP_RULES[rule], analytic.Space(family))
    x = analytic.start(name, family, 256)
    for state in walk(analytic.predictor(name, family), x, course):
        x = state.x
    return analytic.rmse(x, analytic.reference(name, family, 256)), course.n


def _beside_euler(cells: list[tuple[str, str]], schedule) -> dict[str, dict[int, list[float]]]:
    """RMSE of each rule relative to Euler's at as many calls, by rule and calls, as a table too.

    Args:
        cells: targets and families.
        schedule: levels from a family and a number of steps.
    """
    import grid

    ratios = {rule: {calls: [] for calls in range(2, 11)} for rule in RULES}
    print("| calls | " + " | ".join(RULES) + " |\n|---|" + "---|" * len(RULES))
    for calls in range(2, 11):
        row = []
        for rule, steps in RULES.items():
            these = ratios[rule][calls]
            for name, family in cells:
                ours, count = _error(name, family, rule, schedule(family, steps(calls)))
                if count != calls:
                    raise SystemExit(f"{rule}: {count} calls where {calls} were promised")
                these.append(ours / _error(name, family, "euler", schedule(family, calls))[0])
            better = sum(ratio < 1 for ratio in these)
            row.append(f"{grid.geometric(these):.2f} ({max(these):.2f}, {better}/{len(these)})")
        print(f"| {calls} | " + " | ".join(row) + " |", flush=True)
    return ratios


def solvers() -> dict:
    """PFDiff and others against Euler on the grid's targets."""
    import analytic
    import grid

    print("\nuniform t, RMSE relative to Euler's, geometric mean (worst, in how many better)\n")
    cells = [(name, family) for name in analytic.TARGETS for family in grid.FAMILIES]
    pfdiff = _beside_euler(cells, analytic.uniform_t)["pfdiff-1_1"]
    ahead = [ratio for calls in range(4, 11) for ratio in pfdiff[calls]]
    share = sum(ratio < 1 for ratio in ahead) / len(ahead)
    return {"mean": grid.geometric(ahead), "better": share, "ok": share >= 0.9}


def mixtures() -> dict:
    """The same on mixtures that nothing was made on, family by family.

    What docs/schedules.md recommends must hold here: pfdiff-1_1 never worse than Euler from 5 calls
    on for VP and flow, from 8 for EDM.
    """
    import analytic
    import grid

    figures, ok = {}, True
    for schedule in (analytic.uniform_t, analytic.karras):
        for family, least in (("VP", 5), ("flow", 5), ("EDM", 8)):
            if (family, schedule) == ("flow", analytic.karras):
                continue  # nobody's levels
            kind = schedule.__name__.replace("_", " ")
            print(f"\n{family}, {kind}, {len(analytic.OTHERS)} mixtures, as above\n")
            cells = [(name, family) for name in analytic.OTHERS]
            pfdiff = _beside_euler(cells, schedule)["pfdiff-1_1"]
            right = [ratio for calls in range(least, 11) for ratio in pfdiff[calls]]
            figures[f"{family}, {kind}"] = grid.geometric(right)
            ok = ok and max(right) < 1
    return {**figures, "ok": ok}


def hands() -> dict:
    """Every hand-made schedule against the one that is best in its cell."""
    import analytic
    import grid
    from livediffusion.schedules.pupil import Steps

    ratios: dict[tuple, list[float]] = {}
    for name in analytic.TARGETS:
        for family in grid.FAMILIES:
            for rule in grid.SOLVERS:
                pupil = grid.pupil(name, family, rule, 1024, 0)
                for n in grid.STEPS:
                    errors = {
                        hand: float(pupil.terms(Steps(levels)).mean().sqrt())
                        for hand, levels in grid.hands(family, n).items()
                    }
                    for hand, error in errors.items():
                        ratio = error / min(errors.values())
                        ratios.setdefault((family, hand), []).append((rule, ratio))
    print("\nRMSE relative to the best hand-made schedule of the cell, geometric mean (worst)\n")
    for family in grid.FAMILIES:
        print(f"| {family} | " + " | ".join(grid.SOLVERS) + " |\n|---|---|---|---|")
        rows = []
        for (of, hand), found in ratios.items():
            if of == family and len(found) == 3 * len(grid.SOLVERS) * len(grid.STEPS):
                cells = [[r for rule, r in found if rule == solver] for solver in grid.SOLVERS]
                rows.append((grid.geometric([r for _, r in found]), hand, cells))
        for _, hand, cells in sorted(rows):
            row = " | ".join(f"{grid.geometric(cell):.2f} ({max(cell):.1f})" for cell in cells)
            print(f"| {hand} | {row} |")
    return {"cells": len(grid.CELLS), "ok": True}


def found(method: str, shift: bool = False) -> dict:
    """Learned or searched steps over the whole grid."""
    import analytic
    import grid
    from livediffusion.schedules.learned import learned
    from livediffusion.schedules.pupil import Steps
    from livediffusion.schedules.searched import searched

    extra = ", with time shift" if shift else ""
    print(f"\n{method}{extra}: RMSE relative to the best hand-made schedule\n")
    print("| target | solver | " + " | ".join(f"n = {n}" for n in grid.STEPS) + " |")
    print("|---|---|" + "---|" * len(grid.STEPS))
    ratios, beside, calls, began = [], [], 0, time.perf_counter()
    for name in analytic.TARGETS:
        for family in grid.FAMILIES:
            for rule in grid.SOLVERS:
                row = []
                for n in grid.STEPS:
                    contest = grid.contest(name, family, rule, n, grid.samples(name))
                    axis = grid.axis(family)
                    rounds = (
                        searched(contest, axis, 20, 12)
                        if method == "searched"
                        else learned(contest, axis, 15, shift)
                    )
                    *_, best = rounds
                    ratio, hand = grid.judged(name, family, rule, n, best.steps)
                    ratios.append(ratio)
                    chosen = Steps(grid.hands(family, n)[best.hand_made[0]])
                    beside.append(ratio / grid.judged(name, family, rule, n, chosen)[0])
                    calls = max(calls, contest.train.calls, contest.held.calls)
                    row.append(f"{ratio:.3g} {hand}")
                print(f"| {name}, {family} | {rule} | " + " | ".join(row) + " |", flush=True)
    figures = {"mean": grid.geometric(ratios), "worst": max(ratios),
               "worst beside the hand-made one chosen": max(beside), "calls": calls,
               "seconds": round(time.perf_counter() - began)}  # fmt: skip
    bar = 0.92 if method == "searched" else 0.90
    figures["ok"] = figures["mean"] <= bar and max(beside) <= 1.02
    if method == "searched":
        figures["ok"] = figures["ok"] and calls <= 2500
    return figures


def few() -> dict:
    """Learned steps on few samples, beside the hand-made schedule that is best on unseen noise, and
    beside the one that they were judged against, which else would be taken."""
    import grid
    from livediffusion.schedules.learned import learned
    from livediffusion.schedules.pupil import Steps

    print("\nRMSE relative to the best hand-made schedule, geometric mean of the grid (worst)\n")
    print("| samples | learned | the hand-made one chosen | learned / chosen | kept |\n"
          "|---|---|---|---|---|")  # fmt: skip
    figures = {}
    for samples in (16, 64, 128, 256):
        ratios, chosen, kept = [], [], 0
        for name, family, rule, n in grid.CELLS:
            contest = grid.contest(name, family, rule, n, samples)
            *_, best = learned(contest, grid.axis(family), 15)
            hand = Steps(grid.hands(family, n)[best.hand_made[0]])
            ratios.append(grid.judged(name, family, rule, n, best.steps)[0])
            chosen.append(grid.judged(name, family, rule, n, hand)[0])
            kept += best.steps != hand
        beside = [ours / hand for ours, hand in zip(ratios, chosen, strict=True)]
        row = [f"{grid.geometric(r):.3f} ({max(r):.3f})" for r in (ratios, chosen, beside)]
        print(f"| {samples} | {' | '.join(row)} | {kept} of {len(ratios)} |", flush=True)
        figures[samples] = {"mean": grid.geometric(ratios), "worst beside chosen": max(beside)}
    return {**figures, "ok": max(f["worst beside chosen"] for f in figures.values()) <= 1.05}


def demo(samples: int, scales: list[float], strength: float) -> dict:
    """Learned steps on the bundled model, n = 4; below strength 1 from real pictures."""
    import torch
    from livediffusion.demo import loader, looks
    from livediffusion.demo import pictures as previews
    from livediffusion.host.learning.hand_made import fitted, of_comfyui
    from livediffusion.host.learning.study import Subject
    from livediffusion.schedules.find import Ask, Model, evaluations, find, fine
    from livediffusion.schedules.timesteps import SPACINGS, from_strength
    from PIL import Image

    import nodes

    torch.set_num_threads(2)
    prompt, rows, ok = "neon night", [], True

    def small(images):
        # half the native size: a quarter of the time
        return torch.nn.functional.avg_pool2d(images, 2).movedim(1, -1)

    with torch.inference_mode():
        model, clip, vae = loader.load()
        folder = previews.fetched(previews.CACHE)
        crops = previews.crops(previews.split(folder)[0], 2 * samples + 64, 0)
        crops = torch.from_numpy(crops).movedim(-1, 1).float() / 255
        pictures = small(crops[: 2 * samples])
        latents = vae.encode(pictures)
        if strength == 1:
            latents = torch.zeros_like(latents)
        # what the prompt's look is, on other pictures
        look = vae.encode(small(looks.neon(looks.Scene(crops[2 * samples :]))))
        positive, negative = (nodes.CLIPTextEncode().encode(clip, t)[0] for t in (prompt, ""))
    sampling = model.get_model_object("model_sampling")
    table = sampling.sigmas.float().cpu()
    print(f"\nbundled model, {prompt}, strength {strength}, n = 4, {samples} samples\n")
    columns = ["cfg", "solver", "shift", "best hand-made", "its RMSE", "learned", "ratio",
               "Frechet distance", "its", "seconds"]  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for cfg in scales:
        for shift in (False, True) if strength < 1 else (False,):
            solver = "dpmpp_2m"
            ask = Ask("learned", solver, 4, strength, samples, 5, 0, shift=shift)
            ours = {s: from_strength(table, 4, strength, s) for s in SPACINGS}
            hands = fitted(
                [*of_comfyui(sampling, False, int(4 / strength)), *ours.items()], 4, ask.top(table)
            )
            subject = Subject(model, positive, negative, cfg, latents, 2 * samples, 0)
            told = {}

            def work(bench, clean, noise, ask=ask, hands=hands, told=told):
                x = bench.noised(clean, noise, ask.top(table))
                family = Model(bench, bench.space, table, False)
                told["found"], told["errors"] = find(family, x, ask, hands, bench.scaled(look))
                told["fine"] = fine(family, x[samples : samples + 6], strength)

            began = time.perf_counter()
            subject.study(work, lambda done: None)
            took = time.perf_counter() - began
            (error, hand), far = told["errors"]["teacher"], told["errors"]["pictures"]
            ok = ok and (strength < 1 or error <= 0.97 * hand)
            best = told["found"]
            print(f"| {cfg} | {solver} | {'yes' if shift else 'no'} | {best.hand_made[0]} | "
                  f"{hand:.3f} | {error:.3f} | {error / hand:.3f} | {far[0]:.3f} | {far[1]:.3f} | "
                  f"{took:.0f} |", flush=True)  # fmt: skip
            rows.append({"cfg": cfg, "solver": solver, "shift": shift, "ratio": error / hand,
                         "levels": best.steps.levels, "shifts": best.steps.shifts,
                         "about": evaluations(ask, len(hands))})  # fmt: skip
            with torch.inference_mode():
                strips = [told["fine"], best.hand_ends[:6], best.ends[:6]]
                images = [
                    vae.decode(model.model.process_latent_out(strip.float())) for strip in strips
                ]
                if strength < 1:
                    images = [pictures[samples : samples + 6], *images]
                page = torch.cat([torch.cat(list(strip), 1) for strip in images])
                pixels = (page.clamp(0, 1) * 255).byte().numpy()
                name = f"schedules-{strength:g}-cfg{cfg:g}{'-shift' if shift else ''}.png"
                Image.fromarray(pixels).save(pathlib.Path.cwd() / name)
    return {"rows": rows, "ok": ok}


def skipped(samples: int, n: int, side: int, population: int, generations: int) -> dict:
    """A quarter of the bundled model's FLOPs left out, from real pictures at strength 0.5: what is
    searched beside every k-th body, also on pictures that played no part in either."""
    import torch
    from livediffusion.demo import loader
    from livediffusion.demo import pictures as previews
    from livediffusion.engine.step_rules import STEP_RULES
    from livediffusion.host.learning.hand_made import fitted, of_comfyui
    from livediffusion.host.learning.study import Subject
    from livediffusion.host.models import skips
    from livediffusion.schedules.architecture import Network, even
    from livediffusion.schedules.find import Ask, Model, find, fine
    from livediffusion.schedules.pupil import Pupil, Teacher
    from livediffusion.schedules.timesteps import SPACINGS, from_strength

    import nodes

    strength, share, solver, prompt = 0.5, 0.25, "euler", "pop art poster"
    with torch.inference_mode():
        model, clip, vae = loader.load()
        folder = previews.fetched(previews.CACHE)
        crops = previews.crops(previews.split(folder)[0], 3 * samples, 0)
        crops = torch.from_numpy(crops).movedim(-1, 1).float() / 255
        pictures = torch.nn.functional.interpolate(crops, size=(side, side), mode="area")
        latents = vae.encode(pictures.movedim(1, -1))
        positive = nodes.CLIPTextEncode().encode(clip, prompt)[0]
    sampling = model.get_model_object("model_sampling")
    table = sampling.sigmas.float().cpu()
    counted = skips.cost(model, latents.shape[-2:], positive[0][0].shape[1])
    network = Network(counted.bodies, counted.whole)
    ask = Ask("searched", solver, n, strength, samples, generations, 0, population, skip=share)
    ours = {s: from_strength(table, n, strength, s) for s in SPACINGS}
    hands = fitted(
        [*of_comfyui(sampling, False, int(n / strength)), *ours.items()], n, ask.top(table)
    )
    told: dict = {}

    def work(bench, clean, noise):
        family = Model(bench, bench.space, table, False, network)
        x = bench.noised(clean, noise, ask.top(table))
        seen, unseen = x[: 2 * samples], x[2 * samples :]
        began = time.process_time()

        def heard(found, errors):
            stage = "whole" if not found.steps.skips else "cut"
            told[stage] = errors["teacher"]

        told["found"], _ = find(family, seen, ask, hands, heard=heard)
        told["cpu"] = time.process_time() - began
        goal = Teacher(fine(family, unseen, strength))
        pupil = Pupil(bench, unseen, STEP_RULES[solver], bench.space, goal)
        size = goal.ends.double().square().mean().sqrt()
        steps = told["found"].steps
        calls = len(steps.skips)

        def error(cut):
            return float(pupil.terms(steps._replace(skips=cut)).mean().sqrt() / size)

        rules = even(network, share)
        told["unseen"] = error(steps.skips), error(())
        told["rules"] = {name: error((cut,) * calls) for name, cut in rules.items()}

    Subject(
        model, positive, None, 1.0, latents, 3 * samples, 0, frozenset(network.bodies)
    ).study(work, lambda done: None)  # fmt: skip
    (own, rule), (whole, _) = told["cut"], told["whole"]
    best = told["found"]
    print(f"\nbundled model, {prompt}, {side} x {side}, strength {strength}, {solver}, n = {n}, "
          f"{samples} samples, population {population}, {generations} generations\n")  # fmt: skip
    print("| | FLOPs | held out | unseen |\n|---|---|---|---|")
    rules = sorted(told["rules"].items(), key=lambda one: one[1])
    left = even(network, share)
    print(f"| the whole network | 1.00 | {whole:.3f} | {told['unseen'][1]:.3f} |")
    flops = 1 - network.saved(best.steps.skips)
    print(f"| searched | {flops:.2f} | {own:.3f} | {told['unseen'][0]:.3f} |")
    for name, error in rules:
        held = f"{rule:.3f}" if name == best.hand_made[0] else ""
        print(f"| {name} | {1 - network.saved([left[name]]):.2f} | {held} | {error:.3f} |")
    print(f"\n{told['cpu']:.0f} s of one core; left out: {[sorted(s) for s in best.steps.skips]}")
    ratio, fresh = own / rule, told["unseen"][0] / rules[0][1]
    figures = {"ratio": ratio, "ratio unseen": fresh, "flops": flops, "cpu": told["cpu"]}
    return {**figures, "ok": enough(figures, share)}


def enough(figures: dict, share: float) -> bool:
    """Whether `skipped` reached the project's bars.

    Args:
        share: of the FLOPs that was to be left out.
    """
    near = figures["ratio"] <= 0.85 and figures["ratio unseen"] <= 0.85
    return near and figures["flops"] <= 1 - share and figures["cpu"] <= SEARCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--samples", type=int, default=96, help="of the bundled model")
    parser.add_argument("--cfg", type=float, nargs="*", default=[1.0, 3.0])
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=2, help="of skipped")
    parser.add_argument("--side", type=int, default=128, help="pixels, of skipped")
    parser.add_argument("--population", type=int, default=50, help="of skipped")
    parser.add_argument("--generations", type=int, default=8, help="of skipped")
    args = parser.parse_args()
    # the tests' set-up: the pack under its alias, ComfyUI as it makes itself
    spec = importlib.util.spec_from_file_location("conftest", ROOT / "tests" / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    logging.disable(logging.INFO)
    missed = []
    alone = {"solvers": solvers, "mixtures": mixtures, "hands": hands, "few": few}
    for part in args.parts:
        if part in alone:
            figures = alone[part]()
        elif part == "demo":
            figures = demo(args.samples, args.cfg, args.strength)
        elif part == "skipped":
            figures = skipped(
                args.samples, args.steps, args.side, args.population, args.generations
            )
        else:
            figures = found("searched" if part == "searched" else "learned", part == "shifted")
        print(json.dumps({part: figures}))
        missed += [] if figures["ok"] else [part]
    if missed:
        sys.exit(f"bars missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
