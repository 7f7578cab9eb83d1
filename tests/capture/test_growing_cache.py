"""A cache follows its corpus when rows are added to it: the teacher sees these rows alone."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.capture.capture import Capture, fingerprint_of, open_capture
from pipeline.capture.local import capture_locally
from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.errors import DecantError, MismatchError
from pipeline.io.folders import LocalFolder
from pipeline.logit_cache.integrity import check_cache
from pipeline.logit_cache.reader import CacheReader
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.run import run_training
from tests.helpers import capture_all, change, gate, live_teacher, open_cache

SHORT, LONG, LONGER = (
    {"train_tokens": 1500, "validation_tokens": 300},
    {"train_tokens": 1800, "validation_tokens": 300},
    {"train_tokens": 3000, "validation_tokens": 600},
)


def grow(params: Params, sizes: dict[str, int]) -> None:
    corpus = change(params, corpus=sizes).corpus
    build_corpus(corpus, params.paths.teacher, params.paths.corpus, append=True)


def num_rows(params: Params) -> dict[str, int]:
    return {split: len(CorpusSplit(params.paths.corpus, split)) for split in SPLITS}


@pytest.fixture
def cache(tiny_params: Params) -> Params:
    """A cache of 47 and 10 rows, in shards of 16, some of its ids sampled."""
    params = change(tiny_params, corpus=SHORT, prepare={"k": 8, "num_sampled": 4})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    capture_locally(params)
    assert num_rows(params) == {"train": 47, "validation": 10}
    return params


class Seen:
    """The rows that pass through the teacher."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[bytes] = []
        states = HuggingFaceTeacher.states

        def noted(teacher: HuggingFaceTeacher, tokens: torch.Tensor, *words: Any) -> torch.Tensor:
            self.rows += [row.numpy().tobytes() for row in tokens]
            return states(teacher, tokens, *words)

        patch.setattr(HuggingFaceTeacher, "states", noted)
        patch.setattr(Capture, "seconds_per_token", lambda self: 0.0)  # times it on a row


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, cache: Params) -> Seen:
    return Seen(monkeypatch)


def rows_of(params: Params, first: dict[str, int]) -> list[bytes]:
    """All rows from the first ones given on, as `Seen` has them."""
    found = []
    for split, start in first.items():
        corpus = CorpusSplit(params.paths.corpus, split)
        if start < len(corpus):
            found += [row.tobytes() for row in corpus.rows(start, len(corpus)).tokens]
    return found


def comparable(reader: CacheReader, number: int) -> dict[str, torch.Tensor]:
    """The targets of the first rows, whatever the cache's id order."""
    topk = reader.top_k(np.arange(number))
    found = {"has_target": topk.has_target}
    topk = topk[topk.has_target]
    for name in ("ids", "logprobs", "lse", "lse_tau", "entropy"):
        found[name] = getattr(topk, name)
    for name in ("sampled_counts", "sampled_logprobs"):
        values = getattr(topk, name) * (topk.sampled_counts > 0)
        by_id = values.new_zeros(len(values), topk.vocab_size)
        found[name] = by_id.scatter_add_(1, topk.sampled_ids, values)
    return found


def assert_as_captured_at_once(params: Params, folder: Path) -> None:
    """The same targets at every position as a cache that was made from the longer corpus."""
    fresh = change(params, paths={"logits": str(folder / "fresh.zarr")})
    capture_all(fresh)
    for split, number in num_rows(params).items():
        assert check_cache(params.paths.logits, open_cache(params, split).corpus).damages == ()
        one, two = (comparable(open_cache(p, split), number) for p in (params, fresh))
        for name, values in one.items():
            assert torch.equal(values, two[name]), name
    assert gate(params).passed


def test_the_teacher_sees_new_rows_alone(
    cache: Params, seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = num_rows(cache)
    grow(cache, LONGER)
    results = capture_locally(cache, overwrite=True)  # as DVC runs it
    said = capsys.readouterr().out
    assert "train holds the first 47 of 94 rows, and gets those" in said
    new = rows_of(cache, before)
    assert seen.rows == new
    assert sum(result.tokens_done for result in results) == 32 * len(new)
    assert f"of {32 * len(new):,} tokens in 6 shards" in said
    assert_as_captured_at_once(cache, tmp_path)
    assert not list((cache.paths.logits / "train" / "short").glob("*"))  # type: ignore[operator]


def test_readers_of_the_shorter_cache_say_what_to_run(cache: Params) -> None:
    grow(cache, LONG)
    for split in ("train", "validation"):
        corpus = CorpusSplit(cache.paths.corpus, split)
        if split == "validation":  # which is full
            CacheReader(cache.paths.logits, corpus)
            continue
        for read in (CacheReader, check_cache):
            with pytest.raises(
                MismatchError,
                match=r"first 47 of the 57 rows .*: run stages/prepare\.py to capture the rows",
            ):
                read(cache.paths.logits, corpus)
    with pytest.raises(MismatchError, match="first 47 of the 57"):
        run_training(cache, "student")


def test_another_document_among_the_old_rows_is_refused(cache: Params, text_folder: Path) -> None:
    grow(cache, LONGER)
    file = cache.paths.corpus / "other.jsonl"  # type: ignore[operator]
    file.write_text((text_folder / "documents.jsonl").read_text().replace("cat", "dog"))
    files = {"paths": [str(file)], "column": "text"}
    params = change(cache, corpus=SHORT | {"files": files})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    grow(params, LONGER)
    assert num_rows(params) == {"train": 94, "validation": 20}
    with pytest.raises(MismatchError, match=r"was made with corpus_sha256=.*--overwrite"):
        capture_locally(params)
    with pytest.raises(MismatchError, match="captured with corpus_sha256="):
        run_training(params, "student")
    before = (params.paths.logits / "train" / "zarr.json").read_text()  # type: ignore[operator]
    capture_locally(params, overwrite=True)
    assert (params.paths.logits / "train" / "zarr.json").read_text() != before  # type: ignore[operator]
    assert gate(params).passed


def test_parts_complete_it_together(cache: Params, seen: Seen, tmp_path: Path) -> None:
    before = num_rows(cache)
    grow(cache, LONGER)
    for part in (2, 1):
        capture_locally(cache, part=part, parts=2)
    assert len(seen.rows) == len(rows_of(cache, before))
    assert_as_captured_at_once(cache, tmp_path)


def test_twice_before_it_is_captured(cache: Params, seen: Seen, tmp_path: Path) -> None:
    before = num_rows(cache)
    grow(cache, LONG)
    capture_locally(cache, part=1, parts=4)  # shard 0 alone, which is there: only the metadata
    assert seen.rows == []
    grow(cache, LONGER)
    with pytest.raises(MismatchError, match="holds the first 57 of the 95"):
        open_cache(cache)
    capture_locally(cache, part=2, parts=4)  # shards 1 and 5 of train, 1 of validation
    with pytest.raises(MismatchError, match=r"shard 2 of 6 in .* is not captured"):
        open_cache(cache)
    capture_locally(cache)
    assert sorted(seen.rows) == sorted(rows_of(cache, before))
    assert_as_captured_at_once(cache, tmp_path)


def test_killed_at_any_write(cache: Params, tmp_path: Path) -> None:
    """The rest is captured, and at most the short shard again, whichever write was the last."""
    grow(cache, LONG)  # by ten rows, of which one completes the short shard
    untouched = shutil.copytree(cache.paths.logits, tmp_path / "untouched")
    corpus = CorpusSplit(cache.paths.corpus, "train")
    fingerprint = fingerprint_of(cache, corpus, torch.float32)
    teacher = live_teacher(cache)

    def run() -> None:
        capture = open_capture(teacher, corpus, fingerprint, cache)
        capture.run(capture.writer.missing())

    write, number, seen_rows = LocalFolder.write, 0, set()
    complete = False
    while not complete:
        shutil.rmtree(cache.paths.logits)
        shutil.copytree(untouched, cache.paths.logits)
        ticks = iter(range(10**6))

        def fails(self: LocalFolder, key: str, data: bytes) -> None:
            if next(ticks) == number:  # noqa: B023
                raise OSError(errno.ENOSPC, "full")
            write(self, key, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalFolder, "write", fails)
            try:
                run()
                complete = True
            except DecantError as error:
                if "the disk is full" not in str(error):
                    raise
        with pytest.MonkeyPatch.context() as patch:
            seen = Seen(patch)
            run()
        seen_rows.add(len(seen.rows))
        result = check_cache(cache.paths.logits, corpus)
        assert (result.damages, result.missing) == ((), 0)
        number += 2
    assert seen_rows == {10, 25, 9, 0}  # all, the short shard again, the shard after it, nothing
    assert number > 20
    assert_as_captured_at_once(cache, tmp_path)


def test_repair_of_a_cache_that_has_to_grow(cache: Params, seen: Seen, tmp_path: Path) -> None:
    before = num_rows(cache)
    grow(cache, LONGER)
    shard = cache.paths.logits / "train" / "lse" / "c" / "0" / "0"  # type: ignore[operator]
    shard.write_bytes(shard.read_bytes()[:-1])
    capture_locally(cache, repair=True)
    assert len(seen.rows) == len(rows_of(cache, before)) + 16
    assert_as_captured_at_once(cache, tmp_path)


def test_a_short_shard_that_is_damaged_is_captured_whole(
    cache: Params, seen: Seen, tmp_path: Path
) -> None:
    before = num_rows(cache)
    grow(cache, LONGER)
    shard = cache.paths.logits / "train" / "lse" / "c" / "2" / "0"  # type: ignore[operator]
    shard.write_bytes(shard.read_bytes()[:-1])
    capture_locally(cache)
    assert len(seen.rows) == len(rows_of(cache, before)) + 15
    assert_as_captured_at_once(cache, tmp_path)
