"""A search over temperature, alpha and learning rate by Optuna, each trial a run on one cache.

    pip install optuna
    python docs/sweep_optuna.py --trials 20     # repeat it for twenty more
    python stages/report.py --sweep             # the trials as a table and pictures

A trial is what `python stages/train.py --run trialN --set ...` would be, so corpus, cache and
teacher are read and never made again. The study lies in paths.runs/optuna.db.
"""

from __future__ import annotations

import click
import optuna

from pipeline.cli import stage
from pipeline.config.params import Params
from pipeline.config.train_params import TrainParams
from pipeline.errors import DecantError
from pipeline.runtime.console import say
from pipeline.training.run import run_training


@stage
@click.option("--trials", default=20, help="Runs to add to the study.")
def main(params: Params, trials: int) -> None:
    """Search for the lowest validation loss, from where the study stands."""

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True)
        chosen = {
            "temperature": trial.suggest_categorical("temperature", params.prepare.temperatures),
            "alpha": trial.suggest_float("alpha", 0.0, 1.0),
            "learning_rate": rate,
            "min_learning_rate": rate / 10,
        }
        train = TrainParams.model_validate(params.train.model_dump() | chosen)
        result = run_training(params.model_copy(update={"train": train}), f"trial{trial.number}")
        if result.state is None:
            raise DecantError(
                f"{result.folder} is of an earlier study: remove it, or set paths.runs elsewhere"
            )
        best = result.state.best_loss  # of the weights that are saved, with train.keep_best
        return result.state.history[-1]["validation/loss"] if best is None else best

    params.paths.runs.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{params.paths.runs / 'optuna.db'}"
    study = optuna.create_study(storage=storage, study_name="decant", load_if_exists=True)
    study.optimize(objective, n_trials=trials)
    best = study.best_trial
    say(f"trial{best.number} is the best of {len(study.trials)}: {best.value:.4f}, {best.params}")


if __name__ == "__main__":
    main()
