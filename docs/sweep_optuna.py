"""A search over temperature, alpha and learning rate by Optuna, each trial a run on one cache.

    pip install optuna
    python docs/sweep_optuna.py params.yaml 20     # twenty trials; repeat it for twenty more
    python stages/report.py --sweep                # the trials as a table and pictures

A trial is what `python stages/train.py --run trialN --set ...` would be, so corpus, cache and
teacher are read and never made again. The study lies in paths.runs/optuna.db.
"""

from __future__ import annotations

import sys
from pathlib import Path

import optuna

from pipeline.config import load_params
from pipeline.runtime import say
from pipeline.training.run import run_training


def main(file: Path, trials: int) -> None:
    """Add so many trials to the study."""
    base = load_params(file)

    def objective(trial: optuna.Trial) -> float:
        chosen = {
            "train.temperature": trial.suggest_categorical(
                "temperature", base.prepare.temperatures
            ),
            "train.alpha": trial.suggest_float("alpha", 0.0, 1.0),
            "train.learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        }
        params = load_params(file, [f"{key}={value}" for key, value in chosen.items()])
        state = run_training(params, f"trial{trial.number}").state
        assert state is not None  # a new name each time
        return state.history[-1]["validation/loss"]

    base.paths.runs.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{base.paths.runs / 'optuna.db'}"
    study = optuna.create_study(storage=storage, study_name="decant", load_if_exists=True)
    study.optimize(objective, n_trials=trials)
    best = study.best_trial
    say(f"trial{best.number} is the best of {len(study.trials)}: {best.value:.4f}, {best.params}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
