"""What a model does to its logits after the head: multiply them by a constant, cap them softly.

Each architecture has its own names for this in its config. Since both steps act on one logit at a
time, they are applied to each chunk of logits that teacher, student or evaluation computes. A model
that does anything else to its logits is refused when it is opened, because its own logits are
compared with ours (`require_own_logits` in pipeline/model/huggingface.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_FACTORS = (
    "logit_scale",  # Cohere
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
)
_DIVISOR = "logits_scaling"  # Granite, MiniCPM3
_NO_DIVISOR = "hyperclovax"  # the architecture that multiplies by logits_scaling
_SOFT_CAPS = (
    "final_logit_softcapping",  # Gemma
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)


@dataclass(frozen=True)
class LogitTransform:
    """The logits are soft_cap * tanh(scale * z / soft_cap), where z is the head's output."""

    scale: float = 1.0
    soft_cap: float | None = None  # None: scale * z

    @staticmethod
    def of_config(config: Any) -> LogitTransform:
        """Read the transform from a config of transformers; for a wrapper, from its text part."""
        config = config.get_text_config(decoder=True)
        divisor = _number(config, _DIVISOR) or 1.0
        scale = divisor if config.model_type.startswith(_NO_DIVISOR) else 1.0 / divisor
        for name in _FACTORS:
            scale *= _number(config, name) or 1.0
        caps = (_number(config, name) for name in _SOFT_CAPS)
        return LogitTransform(scale, next(filter(None, caps), None))

    def apply_(self, logits: Tensor) -> Tensor:
        """Overwrite the head's output [..., V] with the model's logits, and return them."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits


UNCHANGED = LogitTransform()


def soft_cap_slope(logits: Tensor, soft_cap: float) -> Tensor:
    """Return the derivative of the soft cap, 1 - tanh^2, at logits that it has been applied to."""
    return (logits / soft_cap).square_().neg_().add_(1.0)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None
