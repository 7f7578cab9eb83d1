"""Training curves, kept in the run's state and written by DVCLive."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from dvclive import Live
from scmrepo.exceptions import SCMError

from pipeline.errors import DecantError
from pipeline.runtime.launch import is_first_rank
from pipeline.training.checkpoint import TrainState


class Curves:
    """A log that remembers its values, so that a resumed run replays its history without a gap.

    All ranks remember, because a run may resume on any number of ranks; only rank 0 writes.

    Raises:
        DecantError: on opening, the git repository that contains `folder` has no commit.
    """

    def __init__(self, folder: Path, state: TrainState) -> None:
        self._folder = folder
        self._state = state
        self._live: Any = None

    def __enter__(self) -> Self:
        if is_first_rank():
            try:
                self._live = Live(str(self._folder), save_dvc_exp=False, dvcyaml=None)
            except SCMError as error:
                raise DecantError(
                    f"DVCLive cannot use this git repository ({error}): make a first commit"
                ) from None
            for record in self._state.history:
                self._show(record)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def record(self, values: dict[str, float]) -> None:
        """Add a point at the current step."""
        point = {"step": float(self._state.step), **values}
        self._state.history.append(point)
        self._show(point)

    def _show(self, point: dict[str, float]) -> None:
        if self._live is None:
            return
        self._live.step = int(point["step"])
        for name, value in point.items():
            if name != "step":
                self._live.log_metric(name, value)
        self._live.make_summary()
