"""Passage, retained mass and inputs, against truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, next_token_labels
from pipeline.errors import DecantError
from pipeline.io.files import write_json
from pipeline.model.attention_mask import documents_apart
from pipeline.model.folder import hash_weights
from pipeline.report.passage_view import PassageView, passage_view
from pipeline.report.read_inputs import read_inputs
from pipeline.report.retained import measure_retained_mass
from tests.helpers import capture_all, change, live_teacher, open_cache
from tests.report.made_up import passage


def view(kls: list[float], tokens: list[str]) -> PassageView:
    said = passage({"b": kls, "teacher": [0.0] * len(kls), "student": kls[::-1]}, tokens)
    found = passage_view(said, "student")
    assert found
    return found


def test_a_token_bears_what_was_said_before_it() -> None:
    shown = view([0.05, 0.1, 5.0], ["one", " two", "\n", "x"])
    assert shown.students == ["student", "b"]
    assert [token.text for token in shown.tokens] == ["one", " two", "↵\n", "x"]
    assert [token.sign for token in shown.tokens] == ["one", "·two", "↵", "x"]
    assert [token.levels for token in shown.tokens] == [[], [4, 0], [1, 1], [0, 4]]
    first, second = shown.tokens[:2]
    assert first.opinions == []
    assert [opinion.model for opinion in second.opinions] == ["teacher", "student", "b"]
    assert second.opinions[1].kl == 5.0
    assert [choice.text for choice in second.opinions[0].top[:3]] == ["a", "·two", "·b"]
    assert [choice.follows for choice in second.opinions[0].top[:3]] == [False, True, False]


def test_the_worst_come_first_with_what_stood_before() -> None:
    shown = view([0.05, 0.1, 5.0, 2.0], ["one", " two", " three", " four", "five"])
    found = [(worst.token.sign, worst.student.kl) for worst in shown.worst]
    assert found == [("·three", 5.0), ("·two", 2.0), ("·four", 0.1), ("five", 0.05)]
    assert shown.worst[0].before == "one two"
    assert shown.worst[-1].before == "one two three four"


def test_long_passages_are_cut() -> None:
    shown = view([0.1] * 699, ["t"] * 700)
    assert (len(shown.tokens), shown.left_out) == (512, 188)


def test_retained_mass_is_the_teachers(finished_run: Params) -> None:
    """Softmax of the live teacher's logits at each temperature, summed over the cache's ids."""
    cache = open_cache(finished_run)
    measured = measure_retained_mass(cache)
    assert measured
    assert (measured.shards, measured.all_shards) == (4, cache.layout.num_shards)
    size = cache.layout.shard_rows
    chosen = [i * measured.all_shards // 4 for i in range(4)]
    numbers = [r for s in chosen for r in range(s * size, min(s * size + size, len(cache.corpus)))]
    corpus = CorpusSplit(finished_run.paths.corpus, "train")
    teacher = live_teacher(finished_run)
    kept: dict[float, list[torch.Tensor]] = {tau: [] for tau in (1.0, 2.0, 4.0)}
    for number in numbers:
        rows = corpus.rows(number, number + 1)
        tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
        apart = documents_apart(doc_ids, cache.fingerprint.document_mask)
        logits = torch.cat([part for _, part in teacher.logits_by_chunk(tokens, apart)]).double()
        ids = cache.top_k(np.array([number])).ids[0]
        labels = next_token_labels(tokens, doc_ids, torch.from_numpy(rows.in_loss))
        wanted = labels[0] != IGNORE
        for tau, parts in kept.items():
            parts.append((logits / tau).softmax(-1).gather(-1, ids).sum(-1)[wanted])
    for at in measured.temperatures:
        truth = torch.cat(kept[at.temperature]).numpy()
        assert measured.positions == len(truth)
        assert at.mean == pytest.approx(truth.mean(), abs=1e-3)
        assert at.quantile(0.05) == pytest.approx(np.quantile(truth, 0.05), abs=1e-3)
        assert at.quantiles[-1] == pytest.approx(truth.max(), abs=1e-3)
    assert [at.temperature for at in measured.temperatures] == [1.0, 2.0, 4.0]
    assert measured.share == measured.positions / (32 * len(numbers))
    assert measured.num_ids == 16
    assert measured.temperatures[0].mean > measured.temperatures[-1].mean


def test_retained_mass_of_some_positions_and_ids(tiny_corpus: Params) -> None:
    """Half of them have a target, with fewer than K ids; sampled ids alone hold no mass."""
    cut = {"positions": "high_entropy", "entropy_quantile": 0.5, "top_p": 0.1}
    params = change(tiny_corpus, prepare=cut)
    capture_all(params)
    cache = open_cache(params)
    measured = measure_retained_mass(cache)
    assert measured
    topk = cache.top_k(np.arange(16))
    assert measured.share == pytest.approx(float(topk.has_target.float().mean()), abs=0.05)
    kept = topk.is_kept.sum(-1)[topk.has_target]
    assert measured.num_ids == pytest.approx(float(kept.float().mean()), rel=0.1)
    assert 1 < measured.num_ids < 16
    assert measured.temperatures[0].quantiles.min() >= 0.1 - 1e-3
    sampled = change(
        tiny_corpus,
        prepare={"k": 0, "num_sampled": 4},
        paths={"logits": str(tiny_corpus.paths.logits) + ".sampled"},
    )
    capture_all(sampled)
    assert measure_retained_mass(open_cache(sampled)) is None


def test_what_is_optional_may_be_missing(own_run: Params) -> None:
    paths = own_run.paths
    for file in (paths.evaluate / "passage.json", paths.evaluate / "lm_eval.json"):
        file.unlink()
    (paths.humaneval / "metrics.json").unlink()
    (paths.export / "check.json").unlink()
    found = read_inputs(paths)
    assert found.passage is found.lm_eval is found.humaneval is found.export is None


def broken(text: str) -> Callable[[str], str]:
    return lambda _: text


@pytest.mark.parametrize(
    ("folder", "name", "spoil", "sentence"),
    [
        ("evaluate", "metrics.json", None, r"does not exist\): run stages/evaluate.py first"),
        ("verify", "histogram.json", None, r"does not exist\): run stages/verify.py first"),
        (
            "verify",
            "histogram.json",
            lambda text: text.replace("-1.5", "NaN"),
            r"histogram.json cannot be read \(0.log10_one_minus_cosine: .* finite number\)",
        ),
        (
            "evaluate",
            "samples.json",
            lambda text: text.replace('"prompts": [', '"prompts": ["one more",'),
            "a model has not as many continuations",
        ),
        ("evaluate", "samples.json", broken("{"), r"samples.json cannot be read \(Invalid JSON"),
        (
            "evaluate",
            "metrics.json",
            broken("{}"),
            r"metrics.json cannot be read \(Dict.* at least 1",
        ),
        ("verify", "metrics.json", broken('{"passed": true}'), r"\(batches: Field required\): run"),
        ("humaneval", "metrics.json", broken("[]"), r"cannot be read .*: run stages/humaneval.py"),
        ("export", "check.json", broken(""), r"check.json cannot be read .*run stages/export.py"),
        (
            "evaluate",
            "passage.json",
            lambda text: text.replace('"teacher"', '"other"'),
            "the teacher is not among its models",
        ),
        (
            "evaluate",
            "passage.json",
            lambda text: text.replace('"text_tokens": [', '"text_tokens": ["x", "y",'),
            "its lists are not as long as its text",
        ),
    ],
)
def test_unreadable_files_are_one_sentence(
    own_run: Params, folder: str, name: str, spoil: Callable[[str], str] | None, sentence: str
) -> None:
    file = getattr(own_run.paths, folder) / name
    if spoil:
        file.write_text(spoil(file.read_text()))
    else:
        file.unlink()
    with pytest.raises(DecantError, match=sentence) as caught:
        read_inputs(own_run.paths)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_curves_that_are_none_are_named(own_run: Params) -> None:
    file = own_run.paths.runs / "student/dvclive/plots/metrics/train/loss.tsv"
    file.write_text("step\tloss\n0\tnothing\n")
    with pytest.raises(DecantError, match=r"loss.tsv cannot be read .*run stages/train.py again"):
        read_inputs(own_run.paths)


def test_what_was_measured_before_a_run_was_trained_again_is_left_out(
    own_run: Params, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = own_run.paths.runs / "baseline" / "model"
    shutil.copytree(teacher_folder, model)
    found = read_inputs(own_run.paths)
    assert set(found.scores) == {"teacher", "student"}
    assert found.passage is not None
    everything = (found.samples.continuations, found.passage.models, found.curves)
    assert not any("baseline" in part for part in everything)
    assert {point.model for point in found.calibration} == {"teacher", "student"}
    assert "baseline has been trained again: run stages/evaluate.py" in capsys.readouterr().out
    shutil.copytree(teacher_folder, own_run.paths.runs / "student" / "model")
    with pytest.raises(DecantError, match=r"trained again since: run stages/evaluate\.py"):
        read_inputs(own_run.paths)
    file = own_run.paths.evaluate / "metrics.json"
    scores = json.loads(file.read_text())
    scores["student"]["model_sha256"] = hash_weights(teacher_folder)
    write_json(file, scores)
    found = read_inputs(own_run.paths)
    assert set(found.scores) == {"teacher", "student"}
    assert found.humaneval is None
    assert found.export is None
