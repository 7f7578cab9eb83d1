"""Training curves, kept in the run's state, and written by DVCLive and the loggers asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dvclive import Live
from scmrepo.exceptions import SCMError

from pipeline.config.train_params import ReportTo
from pipeline.errors import DecantError, reason_of
from pipeline.runtime.console import say
from pipeline.runtime.launch import is_first_rank
from pipeline.training.checkpoint import TrainState
from pipeline.training.loggers import LOGGERS, Logger


class Curves:
    """A log that remembers its values, so that a resumed run replays its history without a gap.

    All ranks remember, because a run may resume on any number of ranks; only rank 0 writes.

    Args:
        run: the run's folder; DVCLive's files, which the report reads, go into its `dvclive`.
        report_to: further loggers.
        config: the values of params.yaml, which those show beside the curves.

    Raises:
        DecantError: on opening, the git repository that contains the folder has no commit, or a
            logger's library is not installed.
    """

    def __init__(
        self,
        run: Path,
        state: TrainState,
        report_to: Sequence[ReportTo] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._run = run
        self._state = state
        self._report_to = report_to
        self._config = config or {}
        self._live: Any = None
        self._loggers: list[Logger] = []

    def __enter__(self) -> Self:
        if not is_first_rank():
            return self
        try:
            self._open_loggers()
        except BaseException:
            self._each(lambda logger: logger.close(finished=False))
            raise
        try:
            self._live = Live(str(self._run / "dvclive"), save_dvc_exp=False, dvcyaml=None)
        except SCMError as error:
            raise DecantError(
                f"DVCLive cannot use this git repository ({error}): make a first commit"
            ) from None
        for record in self._state.history:
            self._show(record)
        return self

    def __exit__(self, *error: Any) -> None:
        self._each(lambda logger: logger.close(finished=error[0] is None))
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
        step = int(point["step"])
        values = {name: value for name, value in point.items() if name != "step"}
        self._live.step = step
        for name, value in values.items():
            self._live.log_metric(name, value)
        self._live.make_summary()
        self._each(lambda logger: logger.show(step, values))

    def _open_loggers(self) -> None:
        for name in self._report_to:
            try:
                self._loggers.append(LOGGERS[name](self._run, self._config))
            except DecantError:
                raise
            except Exception as error:  # of three libraries, for keys, servers and files
                raise DecantError(
                    f"run.report_to={name} cannot be opened ({reason_of(error)}): check its "
                    "settings in the environment, or leave it out"
                ) from error

    def _each(self, action: Callable[[Logger], None]) -> None:
        """Do something with each logger; one that fails is dropped, and training goes on."""
        for logger in list(self._loggers):
            try:
                action(logger)
            except Exception as error:
                self._loggers.remove(logger)
                say(
                    f"train: warning: {type(logger).__name__} fails ({reason_of(error)}), so its "
                    "log ends here; DVCLive has the whole curves"
                )
