"""A finished run, made small: corpus and cache are real, the other stages' results made up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.evaluation.results import (
    CalibrationBin,
    HumanEvalScores,
    Samples,
    TaskMetric,
)
from pipeline.export.check_result import ExportCheck, PathResult, TokenizerResult
from pipeline.io.files import write_json, write_text
from pipeline.runtime.bootstrap import Interval
from pipeline.verify.gate_report import (
    FitTest,
    Found,
    GateReport,
    GateSummary,
    HistogramBin,
    Levels,
    Limits,
)
from pipeline.verify.limits import QUANTITIES
from tests.helpers import capture_all, change, tiny_values
from tests.report.browser import Browser, find_browser
from tests.report.made_up import HOSTILE, MODEL, passage, scores


def gate_report() -> GateReport:
    """A gate that passed, on a cache with sampled ids."""
    cache = GateSummary(
        mean_cosine=0.999612,
        min_cosine=0.97,
        worst_row_cosine=0.9991,
        mean_kl=7e-4,
        max_kl=0.07,
        top1=0.98,
        overlap=0.97,
        logprob_error=0.05,
        lse_error=0.09,
        lse_tau_error=0.02,
        entropy_error=0.03,
        entropy_gap=None,
        sampled_agreement=0.9,
    )
    names = [quantity.name for quantity in QUANTITIES]
    test = FitTest(name="inverse temperature", value=1.003, low=0.98, high=1.02, found=1.03)
    levels = Levels(mean=1e-3, worst_row=2e-3, position=None)
    return GateReport(
        batches=20,
        rows=20,
        tokens=640,
        capture_engine="transformers",
        noise_engine="transformers",
        live_engine="transformers",
        cache=cache,
        noise_floor=cache,
        negative_control=replace(cache, mean_cosine=0.08),
        limits=Limits(errors=dict.fromkeys(names, levels), signed={}),
        sampling_tests={test.name: test},
        found=Found(
            errors=dict.fromkeys(names, replace(levels, mean=2e-3)),
            signed={},
            sampled={},
            wrong_positions=0.0047,
            wrong_shards=5,
            shards=200,
            shards_seen=100,
            batches_for={"one position in 1,000": 94, "one shard": 190},
        ),
        failures=[],
    )


def write_inputs(params: Params) -> None:
    """What verify, train, evaluate, humaneval and export would have written."""
    paths = params.paths
    models = {
        "teacher": scores(2.0),
        "student": scores(2.75, kl=1.0),
        "baseline": scores(3.0, kl=1.5),
    }
    write_json(paths.evaluate / "metrics.json", models)
    texts = {name: ["one\n", HOSTILE] for name in models}
    write_json(paths.evaluate / "samples.json", Samples(["the cat", HOSTILE], texts))
    points = [(0.1, 0.12), (0.5, 0.4), (0.9, 0.95)]
    write_json(
        paths.evaluate / "calibration.json",
        [
            CalibrationBin(model=n, confidence=c, accuracy=a, share=0.3)
            for n in models
            for c, a in points
        ],
    )
    tokens = [f"word{i} " for i in range(40)] + [":\n", "    ", HOSTILE, "\x00", ""]
    steps = [0.05, 0.3, 0.7, 1.5, 3.0]
    kls = [steps[i % 5] for i in range(len(tokens) - 1)]
    said = {"teacher": [0.0] * len(kls), "student": kls, "baseline": kls[::-1]}
    write_json(paths.evaluate / "passage.json", passage(said, tokens))
    harness = {"lambada": {"acc": TaskMetric(0.3125, 0.0125), "ppl": TaskMetric(8.5, None)}}
    write_json(paths.evaluate / "lm_eval.json", {"teacher": harness, "student": harness})
    write_json(paths.verify / "metrics.json", gate_report())
    shares = {"cache": [0.9, 0.1, 0.0], "noise floor": [0.8, 0.2, 0.0], "shifted by one": [0, 0, 1]}
    write_json(
        paths.verify / "histogram.json",
        [
            HistogramBin(series=name, log10_one_minus_cosine=-1.5 + 0.5 * i, share=share)
            for name, bins in shares.items()
            for i, share in enumerate(bins)
        ],
    )
    for run in ("student", "baseline"):
        folder = paths.runs / run / "dvclive" / "plots" / "metrics"
        for name in ("validation/loss", "validation/kl", "train/loss"):
            value = name.rpartition("/")[2]
            write_text(folder / f"{name}.tsv", f"step\t{value}\n0\t5.5\n8\t3.25\n")
    student = HumanEvalScores(
        pass_at={"1": 0.125, "10": 0.375},
        interval=Interval(0.0625, 0.1875),
        problems=164,
        samples_per_problem=20,
        statuses={"passed": 410, "failed": 2800, "timed out": 70},
        temperature=0.8,
        tokens_per_second=331.4,
        new_tokens=56_000,
        model_sha256=MODEL,
    )
    write_json(paths.humaneval / "metrics.json", {"student": student})
    check = ExportCheck(
        model="student",
        model_sha256=MODEL,
        reference="ours, float32",
        prompts=20,
        new_tokens=16,
        paths=[PathResult("llama.cpp, q8_0", 320, 301, 0, 17, required=False, passed=True)],
        tokenizers=[TokenizerResult("llama.cpp", 1000, 999, passed=False)],
        left_out=[],
    )
    write_json(paths.export / "check.json", check)


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, text_folder: Path
) -> Params:
    """All inputs of the page; shared, so not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    values = tiny_values(teacher_folder, text_folder, folder)
    values["paths"]["teacher"] = str(teacher_folder)
    params = Params.model_validate(values)
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    capture_all(params)
    write_inputs(params)
    return params


@pytest.fixture
def own_run(finished_run: Params, tmp_path: Path) -> Params:
    """The same with files of its own, but for corpus and cache."""
    changed = {}
    for name in ("evaluate", "verify", "runs", "humaneval", "export"):
        shutil.copytree(getattr(finished_run.paths, name), tmp_path / name)
        changed[name] = str(tmp_path / name)
    return change(finished_run, paths={**changed, "report": str(tmp_path / "report")})


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium, where there is one."""
    binary = find_browser()
    if binary is None:
        pytest.skip("neither chromium nor google-chrome is on the path")
    with Browser(binary, tmp_path_factory.mktemp("profile")) as running:
        yield running
