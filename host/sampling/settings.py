"""What a run of a stream is asked for."""

from dataclasses import dataclass

from ...engine.step_rules import STEP_RULES


@dataclass(frozen=True)
class Settings:
    """The knobs of a stream that are not the guider's. All may change between two runs.

    Attributes:
        sigmas: n + 1 descending noise levels.
        step_rule: a name in engine.step_rules.STEP_RULES.
        seed: of the slots' fixed noise.
        drain: True treats the frames as a clip: the ring is driven until the last one has left.
        immediate: True puts frames in flight under the newest conditioning at once.
        add_noise: False lets source latents enter as they are.
    """

    sigmas: tuple[float, ...]
    step_rule: str = "lcm"
    seed: int = 0
    drain: bool = False
    immediate: bool = False
    add_noise: bool = True

    @property
    def slots(self) -> int:
        """The first slots, as many as have a noise that frames meet."""
        if not STEP_RULES[self.step_rule].draws:
            return 1
        return len(self.sigmas) - (self.sigmas[-1] == 0)
