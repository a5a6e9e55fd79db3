"""Schedules as nodes: where the steps go."""

from ..host.learning.hand_made import beside
from ..host.sampling.check import noise_table
from ..schedules.optimized import SOLVERS, bound, from_optimized
from ..schedules.timesteps import SPACINGS, from_indices, from_strength, parse_indices
from .compat import io
from .plot import plot


class LiveTimesteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveTimesteps",
            display_name="Live Timesteps",
            category="live/schedules",
            description="StreamDiffusion's t_index_list: pick noise levels from an even grid.",
            inputs=[
                io.Model.Input("model", tooltip="Gives the noise levels."),
                io.String.Input(
                    "indices",
                    default="18, 26, 35, 45",
                    tooltip="Rising places in the grid, 0 is the noisiest. Their number is the "
                    "number of slots; a later first place keeps more of the input.",
                ),
                io.Int.Input(
                    "grid",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Number of places in the grid; 50 is what LCM models were trained on.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, model, indices, grid) -> io.NodeOutput:
        table, _ = noise_table(model)
        return _shown(model, from_indices(table, parse_indices(indices, grid), grid))


class LiveStrength(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveStrength",
            display_name="Live Strength",
            category="live/schedules",
            description="One dial instead of a list: how far the picture may move from its input.",
            inputs=[
                io.Model.Input("model", tooltip="Gives the noise levels."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Denoising steps n, which is the number of slots.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 keeps the input, 1 forgets it. 0.4 to 0.7 for live pictures.",
                ),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default="uniform t",
                    tooltip="uniform t: even in training timesteps, right for LCM and Turbo. "
                    "log-snr and karras: more steps at low noise, for ordinary solvers. lcm: "
                    "LCM's own grid. fast-ddpm: more at high noise. ays: Align Your Steps.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, model, steps, strength, spacing) -> io.NodeOutput:
        table, flow = noise_table(model)
        return _shown(model, from_strength(table, steps, strength, spacing, flow))


class LiveOptimizedSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LiveOptimizedSteps",
            display_name="Live Optimized Steps",
            category="live/schedules",
            description=(
                "Noise levels that minimise a bound on the solver's error (Xue et al. 2024). "
                "Needs no model calls; the result is kept."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Gives the noise levels."),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="unipc",
                    tooltip="The solver that will use the steps: the bound is of its order.",
                ),
                io.Int.Input(
                    "steps",
                    default=5,
                    min=1,
                    max=20,
                    tooltip="Model calls n, which is the number of slots. Made for 5 to 10.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts at the noisiest level; less starts in the middle, as live "
                    "pictures do.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, model, solver, steps, strength) -> io.NodeOutput:
        table, flow = noise_table(model)
        levels = from_optimized(table, solver, steps, strength, flow)
        even = from_strength(table, steps, strength)
        ratio = bound(table, levels, solver, flow) / bound(table, even, solver, flow)
        return _shown(model, levels, f"bound on the error: {ratio:.2f} x that of uniform t")


def _shown(model, levels, *lines: str) -> io.NodeOutput:
    others = beside(model.get_model_object("model_sampling"), len(levels) - 1, float(levels[0]))
    return io.NodeOutput(levels, ui=plot(levels, others, list(lines)))
