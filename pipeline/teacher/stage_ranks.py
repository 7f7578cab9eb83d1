"""A stage whose teacher is shared by the processes that torchrun started.

This module does not import PyTorch, so that a stage's --help does not wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.runtime.launch import is_first_rank, num_ranks

if TYPE_CHECKING:
    from pipeline.config.params import Params


def shares_teacher(function: Callable[..., None]) -> Callable[..., None]:
    """Let the processes that torchrun started share the teacher; goes below `@stage`.

    The stage runs on rank 0; the other ranks compute for it (pipeline/teacher/sharded.py).
    """

    @functools.wraps(function)
    def run(params: Params, *words: Any, **options: Any) -> None:
        if num_ranks() == 1:
            function(params, *words, **options)
            return
        from pipeline.teacher.sharded import follow, lead

        if not is_first_rank():
            follow(params.device)
            return
        with lead(params.device):
            function(params, *words, **options)

    return run
