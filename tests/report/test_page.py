"""The page as HTML: whole, closed, self-contained, and saying what the inputs say."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.io.files import write_json
from pipeline.report import write_report
from tests.report.made_up import HOSTILE, SECTIONS, made_up_runs, scores

_VOID = {"meta", "link", "input", "br", "img", "hr"}


class Reader(HTMLParser):
    """Elements with their attributes and text; refuses tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}  # by the section's id
        self.source = page
        self.whole = ""
        self._open: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self._open.append((tag, dict(attributes).get("id")))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] not in ("style", "script"):
            self.whole += data
        for tag, name in self._open:
            if tag == "section" and name:
                self.text[name] = self.text.get(name, "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(finished_run: Params) -> Reader:
    file = write_report(finished_run)
    assert file == finished_run.paths.report / "index.html"
    return Reader(file.read_text())


def test_sections_and_their_numbers(page: Reader) -> None:
    assert list(page.text) == SECTIONS
    links = [link["href"] for link in page.all("a")]
    assert links == [f"#{name}" for name in SECTIONS]
    for said in (
        "25%of the gap",
        "2 layers of the teacher",
        "mean cosine 0.999612 to the",
        "DIFFERS",
    ):
        assert said in re.sub(r"</?\w+>|\s*\n\s*| (?=of the gap)", "", page.whole), said
    expected = {
        "models": ["2.750 ± 0.020", "75.0%", "0.510", "7.125", "95% bootstrap"],
        "gate": [
            "✓ passed",
            "20 batches",
            "0.999612",
            "0.080000",
            "≥ 0.999",
            "7.00e-04",
            "100 of 200 shards were looked at",
            "5 wrong shards",
            "0.47% of positions",
            "190 batches find one shard.",
            "inverse temperature 1.003 (0.980 to 1.020)",
            "≤ 0.998000",
        ],
        "retained": ["From the cache:", "This run: temperature 1."],
        "passage": ["word3", "Where student is farthest from its teacher", "∅", "␀"],
        "samples": ["the cat", "one"],
        "humaneval": ["12.5%", "6.2% to 18.8%", "37.5%", "pass@10", "410 passed", "70 timed out"],
        "harness": ["lambada", "0.3125 ± 0.0125", "8.5000"],
        "export": ["✗ failed", "301 of 320", "17 of 20", "999 of 1,000"],
        "provenance": ["teacher_sha256", "torch", "Python 3.", "learning_rate"],
    }
    for section, words in expected.items():
        for word in words:
            assert word in page.text[section], (section, word)
    assert "hidden_size" not in page.text["provenance"]  # the student has layers of the teacher
    assert "None" not in page.text["provenance"]


def test_it_loads_nothing(page: Reader) -> None:
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
                assert value
                assert value.startswith(("#", "data:,")), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert not {"img", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    assert len(page.all("script")) == 1
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv"))
    assert policy
    assert policy.startswith("default-src 'none'; ")


def test_it_can_be_read_without_seeing_it(page: Reader) -> None:
    ids = Counter(a["id"] for _, a in page.elements if "id" in a)
    assert [name for name, count in ids.items() if count > 1] == []
    for _, attributes in page.elements:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            if name in attributes:
                assert attributes[name] in ids
        for value in attributes.values():
            for target in re.findall(r"url\(#([^)]*)\)", value or ""):
                assert target in ids
    pictures = page.all("svg")
    assert len(pictures) == 6
    assert all(p.get("role") == "img" and p.get("aria-label") for p in pictures)
    assert len(page.all("caption")) == len(page.all("table")) >= 8
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    assert page.all("html") == [{"lang": "en"}]


def test_hostile_text_is_text(page: Reader, own_run: Params) -> None:
    assert page.text["samples"].count(HOSTILE) == 6  # a prompt and a sample of three models
    assert HOSTILE in page.text["passage"]
    metrics = own_run.paths.evaluate / "metrics.json"
    write_json(metrics, json.loads(metrics.read_text()) | {HOSTILE: scores(2.5, kl=0.5)})
    file = write_report(own_run, made_up_runs())
    hostile = Reader(file.read_text())
    assert len(hostile.all("script")) == 1
    assert hostile.all("img") == []
    assert HOSTILE in hostile.text["models"]
    assert HOSTILE in hostile.text["sweep"]


def test_sweep_has_table_and_pictures(own_run: Params) -> None:
    shown = Reader(write_report(own_run, made_up_runs()).read_text())
    assert list(shown.text) == [*SECTIONS[:-1], "sweep", "provenance"]
    assert [t.get("class") for t in shown.all("table")].count("sortable") == 1
    assert "Validation loss by train.k" in shown.text["sweep"]
    assert "a point a run" in shown.text["sweep"]
    assert len(shown.all("svg")) == 8


def made_by(params: Params, run: str, **sections: dict[str, Any]) -> Params:
    """Leave run.json as train does, with other parameters than those at hand."""
    write_json(params.paths.runs / run / "run.json", {"seed": 0, **sections})
    return params


def words_of(text: str) -> str:
    return " ".join(text.split())


def test_the_page_tells_what_the_run_was_made_by(own_run: Params) -> None:
    """Not what params.yaml says by now, or said to a run beside."""
    made_by(own_run, "student", student={"init": "random"}, train={"temperature": 3.5})
    shown = Reader(write_report(own_run).read_text())
    assert "begun from random weights and distilled from" in words_of(shown.whole)
    assert "This run: temperature 3.5." in shown.text["retained"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cached", "a teacher of 85.0 M, offline:"),
        ("online", "a teacher of 85.0 M, live. The cache holds 3,0"),
        ("none", "and trained without a teacher. The cache holds 3,0"),
    ],
)
def test_the_summary_says_how_it_was_trained(own_run: Params, how: str, said: str) -> None:
    shown = Reader(write_report(made_by(own_run, "student", train={"targets": how})).read_text())
    whole = words_of(shown.whole)
    assert said in whole
    assert ("offline" in whole) is (how == "cached")
    assert ("The cache holds" in whole) is (how != "cached")


def test_a_baseline_of_another_kind_is_no_equal(own_run: Params) -> None:
    """The sentence on a fair comparison stands where run.json of both bears it out."""
    made_by(own_run, "student", train={"targets": "cached", "alpha": 0.5, "steps": 8})
    made_by(own_run, "baseline", train={"targets": "none", "alpha": 0.0, "steps": 8})
    shown = Reader(write_report(own_run).read_text())
    fair = "The baseline has the student's start, data and steps"
    assert fair in words_of(shown.whole)
    assert "Baseline: the same start" in shown.text["models"]
    made_by(own_run, "baseline", train={"targets": "none", "steps": 99})
    shown = Reader(write_report(own_run).read_text())
    assert "The baseline has no teacher and differs from student in train.steps too." in words_of(
        shown.whole
    )
    assert fair not in words_of(shown.whole)
    assert "Baseline: the same start" not in shown.text["models"]


def test_of_a_model_made_elsewhere_no_training_is_told(own_run: Params) -> None:
    write_json(
        own_run.paths.evaluate / "metrics.json", {"teacher": scores(2.0), "other": scores(2.5)}
    )
    shown = Reader(write_report(own_run).read_text())
    whole = words_of(shown.whole)
    assert "A other of 85.0 M parameters, which is no run of this project. The cache holds" in whole
    assert "distilled" not in whole
    assert "This run:" not in shown.text["retained"]
    assert "learning_rate" not in shown.text["provenance"]
    assert "teacher_sha256" in shown.text["provenance"]


def test_parameters_of_a_run_that_are_none(own_run: Params) -> None:
    for damaged in ({"train": {"steps": -1}}, {"train": 3}, {"student": {"no": 1}}):
        made_by(own_run, "student", **damaged)  # type: ignore[arg-type]
        with pytest.raises(
            DecantError, match=r"run\.json cannot be read .* stages/train\.py again"
        ):
            write_report(own_run)


def test_an_export_of_another_model_is_named_as_such(own_run: Params) -> None:
    file = own_run.paths.export / "check.json"
    content = json.loads(file.read_text()) | {"model": "t2", "reference": "before the export"}
    content["paths"][0] |= {"near_ties": 3}
    write_json(file, content)
    shown = Reader(write_report(own_run).read_text())
    assert "t2: 1 path against a reference" in shown.whole
    assert "301 of 320, 3 near ties" in shown.text["export"]
    assert "with a reference: before the export" in shown.text["export"]


def test_what_is_missing_is_left_out(own_run: Params) -> None:
    (own_run.paths.evaluate / "passage.json").unlink()
    (own_run.paths.evaluate / "lm_eval.json").unlink()
    (own_run.paths.humaneval / "metrics.json").unlink()
    (own_run.paths.export / "check.json").unlink()
    gone = {"passage", "humaneval", "harness", "export"}
    shown = Reader(write_report(own_run).read_text())
    assert list(shown.text) == [name for name in SECTIONS if name not in gone]
    assert "HumanEval" not in shown.whole
    assert "≥ 0.999000" in shown.text["gate"]


def test_the_gate_of_a_cache_of_counts_alone(own_run: Params) -> None:
    """Columns of what such a cache does not store are left out."""
    names = ("mean_kl", "max_kl", "top1", "overlap", "logprob_error", "lse_tau_error")
    metrics = own_run.paths.verify / "metrics.json"
    report = json.loads(metrics.read_text())
    for series in ("cache", "noise_floor", "negative_control"):
        report[series] |= dict.fromkeys(names)
    write_json(metrics, report)
    shown = Reader(write_report(own_run).read_text()).text["gate"]
    assert "sampled ids found again" in shown
    assert "mean cosine" in shown
    assert "mean KL" not in shown
    assert "overlap of ids" not in shown


@pytest.mark.parametrize("models", [["teacher"], ["teacher", "models/other"], ["student"]])
def test_any_models_make_a_page(own_run: Params, models: list[str]) -> None:
    """Also numbers of one row, which have no intervals, and models that are no runs."""
    found = {name: replace(scores(2.0, kl=0.5), interval={}) for name in models}
    write_json(own_run.paths.evaluate / "metrics.json", found)
    shown = Reader(write_report(own_run).read_text())
    assert all(name in shown.text["models"] for name in models)
    assert "bootstrap" not in shown.text["models"]
    assert "of the gap" not in shown.whole
    assert "Baseline: the same start" not in shown.text["models"]
    assert len(shown.all("svg")) == (6 if "student" in models else 3)


def test_the_same_inputs_make_the_same_page(page: Reader, own_run: Params) -> None:
    assert write_report(own_run).read_text() == page.source


def test_nothing_is_written_when_a_file_is_unreadable(own_run: Params) -> None:
    (own_run.paths.export / "check.json").write_text("{}")
    with pytest.raises(DecantError, match=r"check.json cannot be read"):
        write_report(own_run)
    assert not own_run.paths.report.exists()


def test_templates_travel_with_the_package() -> None:
    """The names in pyproject.toml cover all files beside the modules."""
    import tomllib

    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["pipeline.report"]
    folder = root / "pipeline" / "report"
    packed = {file for pattern in patterns for file in folder.glob(pattern)}
    files = {f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert {file for file in files if file.suffix != ".py"} == packed
