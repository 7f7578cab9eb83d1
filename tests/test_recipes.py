"""Recipes: short, true to their figures, and run through every stage with tiny models.

The demo's params.yaml goes through them in test_stages.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Command
from click.testing import CliRunner

from pipeline.config.params import Params, load_params
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.plan_text import plan_lines
from pipeline.runtime.console import readable_bytes
from stages import corpus, evaluate, fetch, prepare, train, verify
from tests.helpers import ROOT
from tests.models import make_gpt_oss, make_qwen3, make_teacher

FOLDER = ROOT / "docs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PAGES = [*RECIPES, FOLDER / "README.md", ROOT / "docs" / "scale.md"]
COMMAND = "$ python stages/advise.py --plan"


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every key that is not a section, by its path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_holds_what_differs_from_the_defaults(file: Path) -> None:
    """And, even if they are the same, what it is about: teacher, text, the recipe's alpha."""
    defaults = leaves(Params().model_dump(mode="json"))
    about = ("teacher.hub.", "corpus.hub.", "train.alpha")
    here = leaves(yaml.safe_load(file.read_text()))
    idle = {key for key, value in here.items() if value == defaults.get(key, "unknown")}
    assert not {key for key in idle if not key.startswith(about)}
    load_params(file)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_overwrites_nothing_of_another(file: Path) -> None:
    """The smoke recipe shares its teacher with the long run, nothing else."""
    for other in {ROOT / "params.yaml", *RECIPES} - {file}:
        one, two = (set(load_params(f).paths.model_dump().values()) for f in (file, other))
        shared = {str(path) for path in one & two if path is not None}
        assert shared <= {"cache/coder-7b/teacher"}


def quoted(page: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Words of each plan command that a page quotes, and the lines quoted below it."""
    mark = "# " if page.suffix == ".yaml" else "    "
    text = page.read_text().replace(f"\\\n{mark}", " ")  # a long command takes two lines
    lines = [line.removeprefix(mark).rstrip() for line in text.splitlines()]
    for number, line in enumerate(lines):
        if line.startswith(COMMAND):
            words, below = shlex.split(line.removeprefix(COMMAND)), lines[number + 1 :]
            last = next((i for i, text in enumerate(below) if text.startswith("advise: ")), 0)
            yield words, below[: last + 1]


def params_of(words: list[str]) -> Params:
    """Those of a quoted command, whatever lies in this machine's cache/."""
    options = list(zip(words[::2], words[1::2], strict=True))
    overrides = [value for name, value in options if name == "--set"]
    params = load_params(ROOT / dict(options).get("--params", "params.yaml"), overrides)
    nowhere = {"teacher": Path("no such folder"), "corpus": Path("no such folder")}
    paths = params.paths.model_copy(update=nowhere)
    return params.model_copy(update={"paths": paths})


def plan_for(words: list[str]) -> Plan:
    return make_plan(params_of(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_are_what_the_plan_computes(page: Path) -> None:
    found = list(quoted(page))
    assert found, f"{page} quotes no plan"
    for words, lines in found:
        expected = plan_lines(plan_for(words), params_of(words))
        assert lines == expected, "quote this instead:\n" + "\n".join(expected)


def test_the_table_of_scale_is_what_the_plan_computes() -> None:
    page = ROOT / "docs" / "scale.md"
    small, large = (plan_for(words) for words, _ in quoted(page))
    for one, two in zip(small.modes, large.modes, strict=True):
        row = f"| {one.mode.name} | {one.bytes_a_token:.1f} | {readable_bytes(one.total)} |"
        assert f"{row} {readable_bytes(two.total)} |" in page.read_text()
    plain, ours = 1.24e9 * 64 * 6, 1.24e9 * small.modes[0].bytes_a_token
    assert f"would take {plain / 1e9:.0f} GB" in page.read_text()
    assert f"here they take {ours / 1e9:.0f} GB" in page.read_text()
    assert small.extent.tokens == pytest.approx(1.6e9, rel=1e-2)
    assert large.extent.tokens == pytest.approx(1e12, rel=1e-2)
    assert all(plan.extent.epochs_per_run == pytest.approx(1, abs=0.05) for plan in (small, large))


def test_the_recipe_for_a_t4_fits_into_its_memory_and_six_hours() -> None:
    params = load_params(FOLDER / "wikipedia-zh-t4.yaml")
    plan = make_plan(params)
    assert plan.seconds < 6 * 3600
    assert plan.student_shape.parameters == pytest.approx(123.4e6, rel=1e-3)
    text = "\n".join(plan_lines(plan, params))
    assert "prepare fits" in text
    assert "train fits" in text
    assert "no units" not in text


def test_the_recipe_for_a_t4_trains_by_its_specification() -> None:
    train = load_params(FOLDER / "wikipedia-zh-t4.yaml").train
    assert (train.temperature, train.alpha, train.divergence) == (2.0, 0.5, "forward_kl")
    assert (train.learning_rate, train.weight_decay, train.warmup_steps) == (3e-4, 0.01, 500)
    assert (train.epochs, train.batch_rows, train.gradient_accumulation_steps) == (3, 8, 1)
    assert train.keep_best


def test_recipes_say_when_they_are_accepted() -> None:
    heads = {
        name: " ".join((FOLDER / f"{name}.yaml").read_text().replace("#", "").split())
        for name in ("coder-7b", "coder-7b-smoke")
    }
    assert "has B under 3.0" in heads["coder-7b-smoke"]
    assert "pass@1 on HumanEval is at least 15 %; the goal is 25 %" in heads["coder-7b"]


def test_the_long_recipe_is_what_was_asked_for() -> None:
    params = load_params(FOLDER / "coder-7b.yaml")
    assert params.corpus.train_tokens == 1_600_000_000
    a_step = (
        params.train.batch_rows
        * params.train.gradient_accumulation_steps
        * params.corpus.row_length
    )
    assert (a_step, params.train.steps, params.prepare.k) == (8192, 50_000, 64)
    smoke = load_params(FOLDER / "coder-7b-smoke.yaml")
    assert smoke.train.steps == 500
    assert smoke.teacher == params.teacher
    assert smoke.student == params.student


@pytest.mark.parametrize("name", ["qwen3-32b-4x24gb", "qwen3-32b-fp8-h100", "gpt-oss-20b"])
def test_the_recipes_for_large_teachers_fit(name: str) -> None:
    params = params_of(["--params", f"docs/recipes/{name}.yaml"])
    plan = make_plan(params)
    text = "\n".join(plan_lines(plan, params))
    assert "prepare fits" in text
    assert "train fits" in text
    assert "no kernels" not in text
    shares = (4, "tensor") if name == "qwen3-32b-4x24gb" else (1, "tensor")
    assert (plan.sharing.devices, plan.sharing.parallel) == shares
    assert ("evaluate does NOT fit" in text) == (name == "qwen3-32b-4x24gb")
    assert plan.seconds < 12 * 3600


def run(stage: Command, words: list[str]) -> str:
    """A stage in this process; what it printed."""
    done = CliRunner().invoke(stage, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def start_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student to start from: smaller than the teacher, of the same tokenizer."""
    folder = tmp_path_factory.mktemp("start") / "model"
    return make_teacher(folder, seed=1, num_hidden_layers=2, hidden_size=32)


@pytest.fixture(scope="module")
def teachers(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny teachers by the recipes' own model type; none is quantised, since it runs on a CPU."""
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "qwen2": teacher_folder,
        "qwen3": make_qwen3(folder / "qwen3"),
        "gpt_oss": make_gpt_oss(folder / "gpt_oss"),
    }


def tiny(teacher: Path, text: Path, start: Path, work: Path) -> list[str]:
    """What swaps model and corpus, and makes the rest small; the recipe decides all else."""
    values: dict[str, Any] = {
        "device": "cpu",
        "teacher.source": "folder",
        "teacher.folder.path": teacher,
        "corpus.source": "files",
        "corpus.files": f"{{paths:['{text}/*.jsonl'],column:text}}",
        "corpus.train_tokens": 3000,
        "corpus.validation_tokens": 600,
        "corpus.validation_fraction": 0.15,
        "corpus.row_length": 32,
        "prepare.k": 16,
        "prepare.dtype": "float32",
        "prepare.chunk_rows": 4,
        "prepare.shard_rows": 16,
        "verify.batches": 20,
        "verify.noise_batches": 5,
        "student.hidden_size": 32,
        "student.num_layers": 2,
        "student.num_heads": 4,
        "student.intermediate_size": 64,
        "student.vocab_size": 304,
        "train.steps": 20,
        "train.epochs": "null",
        "train.warmup_steps": 2,
        "train.learning_rate": 0.003,
        "train.eval_every": 10,
        "run.checkpoint_every": 10,
        "evaluate.max_new_tokens": 3,
    }
    for name in Params.model_fields["paths"].annotation.model_fields:  # type: ignore[union-attr]
        if name != "checkpoints":
            values[f"paths.{name}"] = work / name
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_runs_through_the_stages(
    file: Path, teachers: dict[str, Path], text_folder: Path, start_folder: Path, tmp_path: Path
) -> None:
    teacher = teachers[plan_for(["--params", str(file)]).teacher_shape.model_type]
    words = ["--params", str(file), *tiny(teacher, text_folder, start_folder, tmp_path)]
    if load_params(file).student.init == "checkpoint":
        words += ["--set", f"student.checkpoint={start_folder}"]
    for stage in (fetch, corpus, prepare):
        run(stage.main, words)
    assert "gate passed" in run(verify.main, words)
    said = run(train.main, words)
    losses = re.search(r"validation loss ([\d.]+) -> ([\d.]+) in 20 steps", said)
    assert losses, said
    assert float(losses[2]) < float(losses[1])  # what a smoke run is to show
    run(evaluate.main, [*words, "--run", "student"])
    metrics = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert set(metrics) >= {"teacher", "student"}
