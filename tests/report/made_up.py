"""Made-up results for the page."""

from __future__ import annotations

from pipeline.evaluation.results import (
    KLStatistics,
    ModelScores,
    Passage,
    PassageModel,
)
from pipeline.report.sweep import SweepRun
from pipeline.runtime.bootstrap import Interval

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror=alert(1)>\"'&"


MODEL = "ab" * 32
"""A hash of weights."""


def scores(loss: float, *, kl: float = 0.0, margin: float = 0.02) -> ModelScores:
    """A model's entry in metrics.json."""
    means = {
        "loss": loss,
        "kl_to_teacher": kl,
        "top1_agreement": 1.0 - kl / 4,
        "accuracy": 0.5,
    }
    names = ["loss", "accuracy", *(["kl_to_teacher", "top1_agreement"] if kl else [])]
    return ModelScores(
        **means,
        perplexity=2.0**loss,
        calibration_error=0.0123,
        tokens=600,
        kl=KLStatistics(mean=kl, median=0.51, p90=0.92, p95=0.953, p99=0.994, max=7.125),
        interval={name: Interval(means[name] - margin, means[name] + margin) for name in names},
        parameters=84_953_664,
        model_sha256=MODEL,
    )


def passage(models: dict[str, list[float]], tokens: list[str]) -> Passage:
    """A passage in which each model says "a", what follows, and three more."""
    top = [
        [("a", 0.4), (follows, 0.25), (" b", 0.2), ("\n", 0.1), (HOSTILE, 0.05)]
        for follows in tokens[1:]
    ]
    said = {name: PassageModel(kls, [0.25] * len(kls), top) for name, kls in models.items()}
    return Passage(tokens, said)


SECTIONS = ["models", "gate", "retained", "training", "passage", "samples"]


SECTIONS += ["humaneval", "harness", "export", "provenance"]


def made_up_runs() -> list[SweepRun]:
    return [
        SweepRun(name=name, params={"train.k": k, "seed": 0}, loss=loss, kl_to_cache=loss / 4)
        for name, k, loss in (("b", 4, 3.5), ("a", 16, 3.25), (HOSTILE, 8, 10.0))
    ]
