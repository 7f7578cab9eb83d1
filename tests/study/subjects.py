"""Subjects of the study: small models with their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config.delivery_params import StudyParams
from pipeline.study.subject import Subject


def study_params(**changes: Any) -> StudyParams:
    values: dict[str, Any] = {
        "prompt": "the cat sees a river",
        "max_new_tokens": 5,
        "temperature": 0.8,
        "batch_sizes": (1, 3),
        "prompt_tokens": 12,
        "repeats": 1,
        "dtype": "float32",
    }
    return StudyParams(**(values | changes))


def make_subject(folder: Path, layer: int = 1, **changes: Any) -> Subject:
    return Subject(folder, study_params(**changes), layer=layer, device=torch.device("cpu"), seed=0)
