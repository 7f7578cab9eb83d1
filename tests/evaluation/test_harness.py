"""lm-evaluation-harness on a local task, without a network, against float64 log-probabilities."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.params import Params
from pipeline.errors import DecantError, ParamsError
from pipeline.evaluation.harness import Harness, read_metrics
from pipeline.evaluation.results import TaskMetric
from stages.evaluate import main

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

ANIMALS = ("cat", "river", "tower", "student")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def make_task(folder: Path, name: str = "animals", **changes: Any) -> list[dict[str, Any]]:
    """A multiple-choice task of 30 questions; returns them."""
    folder.mkdir(exist_ok=True)
    generator = random.Random(0)
    questions = [
        {
            "question": f"Note {number}: the {generator.choice(ANIMALS)} sees a",
            "choices": generator.sample(ANIMALS, 3),
            "answer": generator.randrange(3),
        }
        for number in range(30)
    ]
    lines = [json.dumps(question) for question in questions]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))
    return questions


def likelihoods(folder: Path, question: dict[str, Any]) -> list[float]:
    """Log-probability of each choice after the question, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for choice in question["choices"]:
        start = tokenizer(question["question"])["input_ids"]
        whole = tokenizer(f"{question['question']} {choice}")["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        rest = range(len(start), len(whole))
        found.append(sum(float(log_p[i - 1, whole[i]]) for i in rest))
    return found


def accuracies(folder: Path, questions: list[dict[str, Any]]) -> tuple[float, float]:
    """Share of right choices by log-probability, and by that per character."""
    right = right_by_length = 0
    for question in questions:
        found = likelihoods(folder, question)
        lengths = [len(choice) for choice in question["choices"]]
        by_length = [value / length for value, length in zip(found, lengths, strict=True)]
        right += found.index(max(found)) == question["answer"]
        right_by_length += by_length.index(max(by_length)) == question["answer"]
    return right / len(questions), right_by_length / len(questions)


def run(harness: Harness, folder: Path) -> Any:
    return harness.run(folder, dtype=torch.float32, device=torch.device("cpu"), batch_rows=8)


def test_a_local_task_against_float64(teacher_folder: Path, tmp_path: Path) -> None:
    questions = make_task(tmp_path / "tasks")
    harness = Harness(["animals"], folder=tmp_path / "tasks")
    expected = accuracies(teacher_folder, questions)
    for _ in range(2):  # tasks serve several models
        metrics = run(harness, teacher_folder)["animals"]
        assert (metrics["acc"].value, metrics["acc_norm"].value) == pytest.approx(expected)
        p = metrics["acc"].value
        assert metrics["acc"].stderr == pytest.approx(math.sqrt(p * (1 - p) / 29))
    limited = Harness(["animals"], folder=tmp_path / "tasks", limit=7)
    expected = accuracies(teacher_folder, questions[:7])
    metrics = run(limited, teacher_folder)["animals"]
    assert metrics["acc"].value == pytest.approx(expected[0])


def test_shots_come_before_each_question(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    make_task(tmp_path / "tasks")
    make_task(tmp_path / "tasks", "fixed", num_fewshot=0)
    contexts = []
    original = HFLM.loglikelihood

    def remember(self: Any, requests: list[Any], **options: Any) -> Any:
        contexts.extend(request.args[0] for request in requests)
        return original(self, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", remember)
    harness = Harness(["animals", "fixed"], folder=tmp_path / "tasks", shots=2, limit=3)
    run(harness, teacher_folder)
    shots = [context.count("Note") - 1 for context in contexts]
    assert sorted(shots) == [0] * 9 + [2] * 9  # a task that says 0 means it


def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    def without_defaults(*, include_path: str, include_defaults: bool = False) -> Any:
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_defaults)  # its own take 20 seconds
    folder = tmp_path / "tasks"
    make_task(folder)
    with pytest.raises(ParamsError, match=r"no task 'animal', did you mean animals: "):
        Harness(["animals", "animal"], folder=folder)
    with pytest.raises(ParamsError, match="absent is no folder"):
        Harness(["animals"], folder=tmp_path / "absent")
    make_task(folder, "unsafe", unsafe_code=True)
    with pytest.raises(ParamsError, match="unsafe runs code that the model writes"):
        Harness(["unsafe"], folder=folder)

    def unreachable(*words: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub (ConnectError)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DecantError, match=r"task animals cannot be loaded \(Couldn't reach"):
        Harness(["animals"], folder=folder)


def test_metrics_of_filters_and_without_errors() -> None:
    values = {
        "name": "t",
        "alias": "t",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "exact_match,strict": 0.75,
        "exact_match_stderr,strict": "N/A",
        "broken,none": float("nan"),
        " ,none": " ",
    }
    assert read_metrics(values) == {
        "acc": TaskMetric(0.5, 0.25),
        "exact_match,strict": TaskMetric(0.75, None),
    }


def test_results_stand_beside_the_others(tiny_corpus: Params, tmp_path: Path) -> None:
    make_task(tmp_path / "tasks")
    teacher = tiny_corpus.paths.teacher
    words = ["--params", str(tmp_path / "params.yaml"), "--model", f"copy={teacher}"]
    task = ["--lm-eval", "animals", "--lm-eval-folder", str(tmp_path / "tasks")]
    done = CliRunner().invoke(main, [*words, *task, "--lm-eval-limit", "10"])
    assert done.exit_code == 0, done.output
    file = tiny_corpus.paths.evaluate / "lm_eval.json"
    results = json.loads(file.read_text())
    assert list(results) == ["teacher", "copy"]
    assert results["copy"] == results["teacher"]
    metric = results["copy"]["animals"]["acc"]
    assert metric.keys() == {"value", "stderr"}
    assert f"  copy: animals acc {metric['value']:.4f} (standard error" in done.output
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert not file.exists()  # of an earlier evaluation
    done = CliRunner().invoke(main, [*words, "--lm-eval-limit", "10"])
    assert done.exit_code == 2
    assert "name tasks by --lm-eval" in done.output
