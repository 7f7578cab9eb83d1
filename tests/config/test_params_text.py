"""params.yaml and show_params: every key with what it means, and nothing lost on the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from click.testing import CliRunner
from pydantic.fields import FieldInfo

from pipeline.config.params import Params, load_params
from pipeline.config.params_text import params_text
from pipeline.config.section import Section
from stages import show_params
from tests.helpers import ROOT

FILE = ROOT / "params.yaml"
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.yaml"))


def fields(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key that is not a section always, by its path."""
    found = {}
    for name, field in section.model_fields.items():
        kinds = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, Section)
        ]
        for kind in kinds:
            found |= fields(kind, f"{prefix}{name}.")
        if field.annotation not in kinds:
            found[prefix + name] = field
    return found


FIELDS = fields(Params)


def test_params_yaml_is_what_the_classes_say() -> None:
    assert load_params(FILE) == Params()
    assert FILE.read_text() == params_text(Params()), (
        "run `python -m stages.show_params --output params.yaml`"
    )


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_has_a_sentence_that_names_its_choices(key: str) -> None:
    said = FIELDS[key].description
    assert said, "write what it means below it"
    assert re.match(r"[A-Z]|auto|n, |r, |null", said), said
    assert said.endswith("."), said
    choices = [str(word).lower() for word in words_of(FIELDS[key].annotation)]
    missing = [word for word in choices if not re.search(rf"\b{re.escape(word)}\b", said.lower())]
    assert not missing, f"{said} does not name {missing}"


def words_of(annotation: Any) -> list[Any]:
    """The words of the Literals in a type; for a list, of its items."""
    found = []
    for argument in get_args(annotation):
        found += words_of(argument) if get_args(argument) else []
        found += [argument] if isinstance(argument, str | bool) else []
    return found


def test_bounds_of_the_type_stand_beside_a_key() -> None:
    lines = params_text(Params()).splitlines()
    assert "  row_length: 256 # L, the number of tokens per row. [>= 2]" in lines
    assert any(line.startswith("  timeout: 3.0 #") and "[> 0, <= 3600]" in line for line in lines)
    assert any(line.startswith("  betas: ") and "[each >= 0, < 1]" in line for line in lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_written_out_is_complete_and_the_same(file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "params.yaml"
    done = CliRunner().invoke(show_params.main, ["--params", str(file), "--output", str(whole)])
    assert done.exit_code == 0, done.output
    assert load_params(whole, complete=True) == load_params(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a, b: [c] # d",
        "null",
        "12",
        "1e3",
        "a\n",
        "\n\nb",
        "\u2028",
        "x\ty",
        "中文",
        "'\"",
    ],
)
def test_any_text_survives(text: str) -> None:
    values = Params().model_dump(mode="json")
    values["evaluate"]["prompts"] = [text, text + "x" * 100]
    values["study"]["prompt"] = text or "-"
    values["student"]["lora"] = {"alpha": 1e-7, "targets": ["q_proj"]}
    params = Params.model_validate(values)
    assert Params.model_validate(yaml.safe_load(params_text(params))) == params


def test_show_params_prints_what_set_and_params_say(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("train: {steps: null}\n")
    words = ["--params", str(file), "--set", "train.epochs=2", "--set", "study.prompt=hi"]
    done = CliRunner().invoke(show_params.main, words)
    assert done.exit_code == 0, done.output
    values = yaml.safe_load(done.stdout)
    assert values["train"]["epochs"] == 2
    assert values["study"]["prompt"] == "hi"
    assert values["prepare"] == yaml.safe_load(FILE.read_text())["prepare"]


def test_a_short_file_can_be_completed_in_place(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("seed: 7\n")
    words = ["--params", str(file), "--output", str(file)]
    assert CliRunner().invoke(show_params.main, words).exit_code == 0
    assert load_params(file, complete=True) == Params(seed=7)


def test_a_stage_that_dvc_runs_refuses_a_short_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("seed: 7\n")
    monkeypatch.setenv("DVC_STAGE", "train")
    done = CliRunner().invoke(show_params.main, ["--params", str(file)])
    assert done.exit_code == 2
    assert re.match(r"error: .*short\.yaml leaves out device \(and \d+ more\)", done.stderr)
