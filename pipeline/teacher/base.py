"""What a teacher is to `train`: something that says TopK for rows of the corpus.

Two of them are interchangeable: `teacher/cached.py` reads the store, `teacher/online.py` runs the
live model. Nothing else in training knows which one it has.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.topk import TopK


class Teacher(Protocol):
    """A source of targets."""

    def top_k(self, rows: NDArray[np.int64], tokens: Tensor) -> TopK:
        """TopK [B, L, K] of the corpus rows `rows`, whose tokens are `tokens` int64 [B, L]."""
        ...
