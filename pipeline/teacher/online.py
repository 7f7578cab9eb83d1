"""The online teacher: the live model makes the same TopK that `prepare` would have stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.teacher.hf import HuggingFaceTeacher
from pipeline.topk import TopK


class OnlineTeacher:
    """Implements `pipeline.teacher.base.Teacher` over a live model.

    Args:
        k: ids kept. temperatures: only those training asks for.
    """

    def __init__(
        self, teacher: HuggingFaceTeacher, *, k: int, temperatures: tuple[float, ...]
    ) -> None:
        self.teacher = teacher
        self.k = k
        self.temperatures = temperatures

    def top_k(self, rows: NDArray[np.int64], tokens: Tensor) -> TopK:
        """One teacher forward over `tokens`."""
        return self.teacher.top_k(tokens, self.k, self.temperatures)
