"""stages/evaluate.py as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline.config.params import Params
from pipeline.errors import DecantError, ParamsError
from pipeline.evaluation.judge import choose_dtypes
from stages.evaluate import main
from tests.helpers import change
from tests.models import make_teacher


def evaluate(params_file: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["--params", str(params_file), *words])


def test_any_folders_are_compared(tiny_corpus: Params, tmp_path: Path) -> None:
    other = make_teacher(tmp_path / "other", seed=4)
    models = ["--model", f"same={tiny_corpus.paths.teacher}", "--model", f"other={other}"]
    done = evaluate(tmp_path / "params.yaml", *models)
    assert done.exit_code == 0, done.output
    target = tiny_corpus.paths.evaluate
    metrics = json.loads((target / "metrics.json").read_text())
    assert list(metrics) == ["teacher", "same", "other"]
    one = metrics["other"]
    for name, interval in one["interval"].items():
        assert interval["low"] <= one[name] <= interval["high"]
    assert one["kl"]["mean"] == one["kl_to_teacher"]
    ordered = [one["kl"][name] for name in ("median", "p90", "p95", "p99", "max")]
    assert ordered == sorted(ordered)
    assert one["parameters"] > 0
    assert "kl_to_teacher" not in metrics["teacher"]["interval"]
    passage = json.loads((target / "passage.json").read_text())
    assert list(passage["models"]) == list(metrics)
    positions = len(passage["text_tokens"]) - 1
    for view in passage["models"].values():
        assert [len(view[key]) for key in ("kl", "p_next", "top")] == [positions] * 3
    samples = json.loads((target / "samples.json").read_text())
    assert list(samples["continuations"]) == list(metrics)
    half = (one["interval"]["loss"]["high"] - one["interval"]["loss"]["low"]) / 2
    assert f"{one['loss']:.4f} ± {half:.4f}" in done.output
    (difference,) = (line for line in done.output.splitlines() if "same - other" in line)
    gap = metrics["same"]["loss"] - one["loss"]
    assert f"loss {gap:+.4f} ± " in difference
    assert "by resampling" in done.output
    assert "evaluate: 3 models on" in done.output


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 1, "run stages/train.py --run student first"),
        (["--run", "../student"], 2, "--run '../student' is not the name of one folder in"),
        (["--run", "student", "--run", "student"], 2, "two models are called student"),
        (["--model", "folder"], 2, "--model 'folder' is not of the form NAME=FOLDER"),
        (["--model", "a/b=folder"], 2, "with a word for a name"),
        (["--model", "x=absent"], 1, "absent holds no config.json: name a model folder by --model"),
        (["--model", "teacher=absent"], 2, "two models are called teacher"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], code: int, sentence: str, tiny_corpus: Params, tmp_path: Path
) -> None:
    done = evaluate(tmp_path / "params.yaml", *words)
    assert done.exit_code == code
    assert sentence in done.output
    assert not tiny_corpus.paths.evaluate.exists()


GPU = torch.device("cuda")
FORMATS = ("float32", "bfloat16", "float16")


@pytest.fixture
def runs(tiny_params: Params, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The teacher, a run trained in each format, and a folder that is not of a run; on an A100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    folders = {"teacher": tiny_params.paths.teacher, "other": tiny_params.paths.runs / "model"}
    for name in FORMATS:
        folders[name] = tiny_params.paths.runs / name / "model"
        folders[name].mkdir(parents=True)
        (folders[name].parent / "run.json").write_text(json.dumps({"train": {"dtype": name}}))
    return folders


def test_on_a_gpu_auto_is_how_each_model_was_made(
    runs: dict[str, Path], tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = change(tiny_params, evaluate={"dtype": "auto"}, prepare={"dtype": "bfloat16"})
    trained = {name: getattr(torch, name) for name in FORMATS}
    as_made = {"teacher": torch.bfloat16, "other": torch.float16} | trained
    assert choose_dtypes(auto, runs, GPU) == as_made
    asked = change(auto, evaluate={"dtype": "float32"})
    assert set(choose_dtypes(asked, runs, GPU).values()) == {torch.float32}
    on_cpu = set(choose_dtypes(auto, runs, torch.device("cpu")).values())
    assert len(on_cpu) == 1  # the fastest, whatever a GPU did
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(ParamsError, match=r"prepare\.dtype=bfloat16, but .* set evaluate\.dtype="):
        choose_dtypes(auto, runs, GPU)
    captured = change(auto, prepare={"dtype": "auto"})
    of_t4 = as_made | {"teacher": torch.float16, "bfloat16": torch.float32}
    assert choose_dtypes(captured, runs, GPU) == of_t4
    (runs["float16"].parent / "run.json").write_text("{")
    with pytest.raises(DecantError, match=r"run\.json is damaged"):
        choose_dtypes(captured, runs, GPU)
