"""A corpus that grows keeps its rows, whatever moment the process that adds to it is killed at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from pipeline.config.params import load_params
from pipeline.data import corpus_zarr
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, SplitInfo, chain_rows
from pipeline.data.packing import PADDING, Rows
from pipeline.io.folders import LocalFolder
from stages.corpus import main
from tests.models import make_sentences


class Growing:
    """The stage over a folder of text; `run()` returns what it prints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.params = folder / "params.yaml"
        values = yaml.safe_load(self.params.read_text())
        self.text = folder / "text"
        self.text.mkdir()
        values["corpus"] |= {"train_tokens": None, "validation_tokens": 10**6}
        values["corpus"]["files"]["paths"] = [str(self.text / "*.jsonl")]
        self.params.write_text(yaml.safe_dump(values))
        self.corpus = Path(values["paths"]["corpus"])

    def write(self, name: str, texts: list[str]) -> None:
        lines = [json.dumps({"text": text}) for text in texts]
        (self.text / name).write_text("\n".join(lines) + "\n")

    def run(self, *words: str, status: int = 0) -> str:
        done = CliRunner().invoke(main, ["--params", str(self.params), *words])
        assert done.exit_code == status, done.output
        return done.output

    def infos(self) -> dict[str, SplitInfo]:
        return {split: CorpusSplit(self.corpus, split).info for split in SPLITS}

    def rows(self) -> dict[str, Rows]:
        """All rows; each split's description has to fit them."""
        found = {}
        for name in SPLITS:
            split = CorpusSplit(self.corpus, name)
            rows, info = split.rows(0, len(split)), split.info
            real = rows.doc_ids != PADDING
            assert info.num_tokens == real.sum()
            assert info.num_in_loss == rows.in_loss.sum()
            assert info.num_used_ids == len(np.unique(rows.tokens[real]))
            assert info.num_documents == len(np.unique(rows.doc_ids[real]))
            assert info.num_digests == len(set(split.digests()))
            assert info.num_digests == info.num_documents + info.num_dropped
            assert info.prefixes[-1] == (info.num_rows, info.sha256)
            for number, sha256 in info.prefixes:
                assert chain_rows(rows[:number]) == sha256 == split.sha256_of_first(number)
            found[name] = rows
        return found


OLD, NEW, LAST = (make_sentences(40, seed=seed) for seed in (1, 2, 3))


@pytest.fixture
def growing(tiny_params: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Growing:
    """A corpus of one file, in shards of 128 rows and 16 documents, of which the last is short."""
    monkeypatch.setattr(corpus_zarr, "_TOKENS_PER_CHUNK", 1024)
    monkeypatch.setattr(corpus_zarr, "_DIGESTS_PER_CHUNK", 4)
    found = Growing(tmp_path)
    found.write("m.jsonl", OLD)
    found.run()
    assert all(len(rows) % 128 for rows in found.rows().values())
    return found


def assert_begins_with(longer: dict[str, Rows], rows: dict[str, Rows]) -> None:
    for split in SPLITS:
        for name, values in vars(rows[split]).items():
            assert np.array_equal(getattr(longer[split], name)[: len(values)], values)


def assert_same(one: dict[str, Rows], two: dict[str, Rows]) -> None:
    assert_begins_with(one, two)
    assert all(len(one[split]) == len(two[split]) for split in SPLITS)


def test_more_files_add_rows_behind_those_that_are_there(growing: Growing) -> None:
    before, infos = growing.rows(), growing.infos()
    growing.write("a.jsonl", [*OLD[:5], *NEW, NEW[0]])  # which is read before the old file
    said = growing.run()
    assert "adds what is new" in said
    assert "documents are new)" in said
    rows, grown = growing.rows(), growing.infos()
    assert_begins_with(rows, before)
    for split in SPLITS:
        assert grown[split].num_rows > infos[split].num_rows
        assert grown[split].prefixes[:-1] == infos[split].prefixes
        first_new = rows[split].doc_ids[infos[split].num_rows, 0]
        assert first_new == infos[split].num_documents
        assert not list((growing.corpus / split / "objects").glob("*"))[1:]
    assert sum(info.num_documents for info in grown.values()) == len({*OLD, *NEW})
    assert "has nothing to do" in growing.run()
    total = sum(info.num_text_bytes for info in grown.values())
    growing.run("--overwrite")  # all documents at once: other rows of the same text
    assert sum(info.num_text_bytes for info in growing.infos().values()) == total
    assert growing.infos()["train"].sha256 != grown["train"].sha256


def test_only_the_last_shards_are_read(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    before = growing.rows()
    growing.write("n.jsonl", NEW)
    read, keys = LocalFolder.read, []

    def notes(self: LocalFolder, key: str) -> bytes:
        keys.append(key)
        return read(self, key)

    monkeypatch.setattr(LocalFolder, "read", notes)
    growing.run()
    last = {name: (len(split) - 1) // 128 for name, split in before.items()}
    assert {key for key in keys if key.startswith("tokens")} == {
        f"tokens/c/{number}/0" for number in last.values()
    }
    assert last["train"] > 0
    assert "digests/c/0/0" in keys


def test_nothing_new_changes_nothing(growing: Growing) -> None:
    before = growing.infos()
    growing.write("again.jsonl", OLD)
    assert "nothing is new" in growing.run()
    assert growing.infos() == before
    assert "has nothing to do" in growing.run("--append")


def test_new_files_alone_then_a_changed_old_one(growing: Growing) -> None:
    before = growing.rows()
    growing.write("n.jsonl", NEW)
    alone = f"corpus.files.paths=[{growing.text / 'n.jsonl'}]"
    growing.run("--append", "--set", alone)
    grown = growing.rows()
    assert_begins_with(grown, before)
    assert "has nothing to do" in growing.run("--set", alone)
    assert "nothing is new" in growing.run()  # all files are named again
    assert_same(growing.rows(), grown)
    growing.write("n.jsonl", LAST)
    growing.run("--append", "--set", alone)
    growing.write("m.jsonl", [*OLD[:-1], "another text"])
    assert "adds" not in growing.run()  # it was named when n.jsonl was not
    assert sum(info.num_documents for info in growing.infos().values()) == 80
    growing.write("o.jsonl", NEW)
    assert "adds" in growing.run(
        "--append", "--set", f"corpus.files.paths=[{growing.text}/o.jsonl]"
    )
    growing.write("o.jsonl", OLD)
    growing.write("m.jsonl", LAST)
    assert "without 2 of the files" in growing.run()


@pytest.mark.parametrize(
    "value", ["row_length=16", "add_bos=false", "max_document_tokens=9", "validation_fraction=0.3"]
)
def test_other_parameters_make_it_anew(value: str, growing: Growing) -> None:
    growing.write("n.jsonl", NEW)
    assert "adds" not in growing.run("--set", f"corpus.{value}")
    assert growing.infos()["train"].prefixes[1:] == ()


def test_limits_that_rise(growing: Growing) -> None:
    small = growing.run("--set", "corpus.train_tokens=300", "--set", "corpus.validation_tokens=60")
    assert "train is full at corpus.train_tokens=300 after" in small
    before = growing.rows()
    growing.write("n.jsonl", NEW)
    limits = ("--set", "corpus.train_tokens=300", "--set", "corpus.validation_tokens=60")
    said = growing.run(*limits)
    for split, limit in (("train", 300), ("validation", 60)):
        assert f"{split} is full at corpus.{split}_tokens={limit}: nothing is added" in said
    assert "nothing is new" in said
    growing.run("--set", "corpus.train_tokens=500", *limits[2:])
    rows = growing.rows()
    assert_begins_with(rows, before)
    assert growing.infos()["train"].num_tokens == 500
    assert len(rows["validation"]) == len(before["validation"])
    assert "adds" in growing.run("--set", "corpus.max_bad_documents=3")  # and no limit for train
    assert "adds" not in growing.run(*limits)  # fewer tokens: made anew
    assert growing.infos()["train"].num_tokens == 300


def test_a_mixture_grows_by_its_weights(growing: Growing) -> None:
    """The source that had no more documents gets some, and those that were left out join them."""

    def mixed(weight: float) -> tuple[str, str]:
        files = [f"{{paths: [{growing.text}/{name}*.jsonl], column: text}}" for name in "ab"]
        sources = [
            f"{{source: files, files: {files[0]}, weight: {weight:g}}}",
            f"{{source: files, files: {files[1]}, weight: 1}}",
        ]
        return "--set", f"corpus.sources=[{','.join(sources)}]"

    growing.write("a1.jsonl", OLD[:20])
    growing.write("b1.jsonl", [*NEW, *LAST])
    growing.run(*mixed(1))
    before, old = growing.rows(), growing.infos()
    growing.write("a2.jsonl", OLD[20:])
    said = growing.run(*mixed(1))
    assert "adds what is new in a mixture of 2 corpus.sources" in said
    [shares] = [line for line in said.splitlines() if "new tokens of train come" in line]
    first, second = (float(word[:-1]) for word in shares.split() if word.endswith("%"))
    assert abs(first - second) < 20.0  # by one document of a few dozen
    assert_begins_with(growing.rows(), before)
    assert growing.infos()["train"].num_tokens > 1.5 * old["train"].num_tokens
    assert "adds" not in growing.run(*mixed(2))


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (("--overwrite",), "--append keeps the corpus and --overwrite rebuilds it", 2),
        (("--set", "corpus.row_length=64"), "rows of corpus.row_length=64 to", 2),
        (("--set", "corpus.packing=best_fit"), "corpus.packing=best_fit to .* made with concat", 2),
        (("--set", "corpus.loss_on=completions"), "corpus.loss_on=completions to", 2),
        (("--set", "corpus.add_bos=false"), "corpus.add_bos=false to .* made with auto", 2),
        (("--set", "corpus.max_document_tokens=9"), "_tokens=9 to .* made with null", 2),
        (("--set", "corpus.validation_fraction=0.5"), "corpus.validation_fraction=0.5 to", 2),
        (("--set", "paths.corpus={folder}/none.zarr"), "none.zarr holds none: run stages/c", 1),
    ],
)
def test_refusals(words: tuple[str, ...], said: str, status: int, growing: Growing) -> None:
    growing.write("n.jsonl", NEW)
    before = growing.infos()
    words = tuple(word.format(folder=growing.folder) for word in words)
    assert_sentence(growing.run("--append", *words, status=status), said)
    assert growing.infos() == before


def assert_sentence(output: str, said: str) -> None:
    import re

    [line] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.search(said, line), line


def test_another_tokenizer_is_refused(growing: Growing, tmp_path: Path) -> None:
    params = load_params(growing.params)
    teacher = shutil.copytree(params.paths.teacher, tmp_path / "other")
    config = teacher / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    words = ("--append", "--set", f"paths.teacher={teacher}")
    growing.write("n.jsonl", NEW)
    assert_sentence(growing.run(*words, status=2), r"another tokenizer .*tokenizer_config\.json")
    (growing.corpus / "source.json").unlink()
    assert_sentence(growing.run("--append", status=1), r"no source\.json .*--overwrite")


def test_a_teacher_with_fewer_rows_is_refused(growing: Growing, tmp_path: Path) -> None:
    teacher = shutil.copytree(load_params(growing.params).paths.teacher, tmp_path / "other")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"vocab_size": 290}))
    growing.write("n.jsonl", NEW)
    said = growing.run("--set", f"paths.teacher={teacher}", status=1)
    assert_sentence(said, "has vocab_size=300, and the teacher's tokenizer makes 290")


class KilledError(BaseException):
    """Stands for the end of the process."""


def is_killed(growing: Growing, number: int) -> bool:
    """Run the stage, and end it before the n-th change of a folder, if there is one."""
    changes = iter(range(10**6))

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def dies(self: LocalFolder, *words: Any) -> Any:
            if next(changes) == number:
                raise KilledError
            return change(self, *words)

        return dies

    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "create", "remove"):
            patch.setattr(LocalFolder, name, dying(getattr(LocalFolder, name)))
        try:
            growing.run()
        except KilledError:
            return True
    return False


def test_killed_at_any_write(growing: Growing) -> None:
    """Each split is the old or the new one, and the same command completes the corpus."""
    untouched = growing.folder / "untouched"
    shutil.copytree(growing.corpus, untouched)
    before = growing.rows()
    growing.write("n.jsonl", NEW[:20])
    growing.run()
    grown, infos = growing.rows(), growing.infos()
    seen, number = set(), 0
    while True:
        shutil.rmtree(growing.corpus)
        shutil.copytree(untouched, growing.corpus)
        if not is_killed(growing, number):
            break
        rows = growing.rows()
        state = tuple(len(rows[split]) > len(before[split]) for split in SPLITS)
        seen.add(state)
        for split, is_new in zip(SPLITS, state, strict=True):
            expected = {split: (grown if is_new else before)[split]}
            for name, values in vars(expected[split]).items():
                assert np.array_equal(getattr(rows[split], name), values)
        growing.run()
        assert growing.infos() == infos
        assert_same(growing.rows(), grown)
        number += 2
    assert seen == {(False, False), (True, False), (True, True)}
    assert number > 20


def test_killed_then_other_text(growing: Growing) -> None:
    """What a killed append has left behind is neither counted nor in the way of other text."""
    untouched = growing.folder / "untouched"
    shutil.copytree(growing.corpus, untouched)
    before = growing.rows()
    growing.write("o.jsonl", LAST)
    growing.run()
    grown = growing.rows()
    for number in range(2, 80, 7):
        shutil.rmtree(growing.corpus)
        shutil.copytree(untouched, growing.corpus)
        (growing.text / "o.jsonl").unlink()
        growing.write("n.jsonl", NEW)
        killed = is_killed(growing, number)
        (growing.text / "n.jsonl").unlink()
        if not killed:
            break
        begun = "adding" in json.loads((growing.corpus / "source.json").read_text())
        shutil.copytree(growing.corpus, growing.folder / "left")
        said = growing.run()  # as it was before
        assert ("has nothing to do" in said) != begun
        assert_same(growing.rows(), before)
        shutil.rmtree(growing.corpus)
        (growing.folder / "left").rename(growing.corpus)
        growing.write("o.jsonl", LAST)
        assert ("adds" in growing.run()) != begun
        if begun:
            assert len(growing.infos()["train"].prefixes) == 1
        else:
            assert_same(growing.rows(), grown)
    assert number > 30


def test_a_reader_that_was_opened_before_goes_on(growing: Growing) -> None:
    params = load_params(growing.params)
    splits = {name: CorpusSplit(growing.corpus, name) for name in SPLITS}
    before = growing.rows()
    for texts in (NEW, LAST):
        growing.write("n.jsonl", [*NEW, *texts])
        growing.run("--append")
    assert growing.infos() == build_corpus(
        params.corpus, params.paths.teacher, params.paths.corpus, append=True
    )
    for name, split in splits.items():
        rows = split.rows(0, len(split))
        assert np.array_equal(rows.tokens, before[name].tokens)
