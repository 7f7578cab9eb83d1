"""Dynamic loss scaling for training in float16.

float16 rounds values below about 3e-8 to zero and keeps few digits below 6e-5, where gradients of a
mean over thousands of tokens often lie. The loss is therefore multiplied by a scale before
backward, and the gradients, which are float32 like the parameters, are divided by it before they
are clipped. If a gradient overflows, the step is skipped and the scale halved; after many steps
without overflow it is doubled (Micikevicius et al. 2018, section 3.2).

The rule and its constants are those of `torch.amp.GradScaler` (tests/training/test_loss_scale.py
compares them). GradScaler itself keeps scale and overflow on the device, where logging the scale
would cost a wait per step. The trainer reads the gradients' global norm anyway, which is the same
on all ranks under every engine and is finite unless a gradient overflowed, so the scale is a number
on the host that is saved with the run's other counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import DecantError

_GROWTH_INTERVAL = 2000  # steps without overflow after which the scale is doubled
_MINIMUM = 1.0


@dataclass
class LossScale:
    """The loss scale of a float16 run and what decides its next change."""

    value: float = 2.0**16
    steps_without_overflow: int = 0  # since the last change
    overflowed: int = 0  # steps skipped so far

    def update(self, *, overflowed: bool) -> None:
        """Adjust the scale after a step.

        Args:
            overflowed: whether the step had to be skipped because gradients were not finite.

        Raises:
            DecantError: gradients overflow without any scaling, so a lower scale will not help.
        """
        if overflowed:
            self.overflowed += 1
            self.steps_without_overflow = 0
            self.value /= 2.0
            if self.value < _MINIMUM:
                raise DecantError(
                    f"the gradients overflow float16 at a loss scale of {_MINIMUM:g}, after "
                    f"{self.overflowed} skipped steps: set train.dtype to bfloat16 or float32, or "
                    "lower train.learning_rate"
                )
            return
        self.steps_without_overflow += 1
        if self.steps_without_overflow == _GROWTH_INTERVAL:
            self.value *= 2.0
            self.steps_without_overflow = 0
