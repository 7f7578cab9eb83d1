"""Capture: resume after a kill, refusals, a full disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.capture.capture import fingerprint_of
from pipeline.capture.local import capture_locally
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.logit_cache.writer import CacheWriter
from tests.helpers import ROOT, capture_all, change, live_teacher, make_capture, open_cache
from tests.models import make_teacher
from tests.waiting import wait_until


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def test_second_capture_finds_nothing_to_do(tiny_cache: Params) -> None:
    results = capture_all(tiny_cache)
    assert [result.shards_done for result in results] == [0, 0]
    assert [result.shards for result in results] == [6, 2]


def test_killed_capture_resumes_to_the_same_store(tiny_corpus: Params, tmp_path: Path) -> None:
    """SIGKILL once some shards are committed; the rest follows and equals an undisturbed run."""
    params = change(tiny_corpus, prepare={"shard_rows": 4})
    commits = params.paths.logits / "train" / "commits"
    command = [sys.executable, str(ROOT / "stages/prepare.py"), "--params"]
    command += [str(tmp_path / "params.yaml"), "--set", "prepare.shard_rows=4"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(commits.glob("0*.json"))) >= 3 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(list(commits.glob("0*.json")))
    assert before >= 3
    results = capture_all(params)
    assert results[0].shards_done == results[0].shards - before
    interrupted = arrays_of(params.paths.logits / "train")
    elsewhere = change(params, paths={"logits": str(tmp_path / "undisturbed.zarr")})
    capture_all(elsewhere)
    undisturbed = arrays_of(elsewhere.paths.logits / "train")
    assert interrupted.keys() == undisturbed.keys()
    for name in undisturbed:
        assert np.array_equal(interrupted[name], undisturbed[name])
    open_cache(params).top_k(np.arange(20))


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        ({"k": 8}, "k=16"),
        ({"temperatures": [1.0]}, "temperatures="),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"document_mask": False}, "document_mask=True"),
    ],
)
def test_other_parameters_are_refused_by_name(
    prepare: dict[str, object], named: str, tiny_cache: Params
) -> None:
    with pytest.raises(MismatchError, match=f"was made with {named}.*--overwrite"):
        capture_all(change(tiny_cache, prepare=prepare))


def test_another_teacher_is_refused(tiny_cache: Params, tmp_path: Path) -> None:
    make_teacher(tmp_path / "other", seed=1)
    other = change(tiny_cache, paths={"teacher": str(tmp_path / "other")})
    with pytest.raises(MismatchError, match="was made with teacher_sha256="):
        capture_all(other)


def test_another_tokenizer_is_refused(tiny_corpus: Params, tmp_path: Path) -> None:
    make_teacher(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(
        file.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    other = change(tiny_corpus, paths={"teacher": str(tmp_path / "other")})
    with pytest.raises(MismatchError, match=r"was tokenized with tokenizer .*corpus\.py"):
        capture_all(other)


def test_k_beyond_the_vocabulary(tiny_corpus: Params) -> None:
    with pytest.raises(ParamsError, match=r"prepare\.k=301 exceeds the 300 ids"):
        capture_all(change(tiny_corpus, prepare={"k": 301}))


def test_whole_vocabulary_can_be_kept(tiny_corpus: Params) -> None:
    capture_all(change(tiny_corpus, prepare={"k": 300}))
    stored = open_cache(tiny_corpus).top_k(np.array([0]))
    sums = stored.logprobs.exp().sum(-1)
    torch.testing.assert_close(sums, stored.has_target.float(), atol=2e-3, rtol=0)


def test_logits_that_overflow_are_named(tiny_corpus: Params, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_teacher(tmp_path / "hot")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hot")
    with torch.no_grad():
        model.model.norm.weight *= float("inf")
    model.save_pretrained(tmp_path / "hot")
    hot = change(tiny_corpus, paths={"teacher": str(tmp_path / "hot")})
    with pytest.raises(DecantError, match="overflow in float32"):
        capture_all(hot)


def test_overwrite_deletes_once_and_then_continues(tiny_cache: Params) -> None:
    other = change(tiny_cache, prepare={"k": 8})
    assert [r.shards_done for r in capture_locally(other, overwrite=True)] == [6, 2]
    make_capture(other, "train").writer.drop(3)
    assert [r.shards_done for r in capture_locally(other, overwrite=True)] == [1, 0]
    assert open_cache(other).fingerprint.k == 8


def test_a_scale_that_the_model_does_not_apply_is_refused(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    """A Llama does not know the key of Granite's scale, by which ours would divide."""
    folder = make_teacher(tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 8.0}))
    with pytest.raises(DecantError, match="a 'llama' model does more after the head"):
        capture_all(change(tiny_corpus, paths={"teacher": str(folder)}))


def test_full_disk_keeps_committed_shards(tiny_corpus: Params, tmp_path: Path) -> None:
    """A file size limit below one shard's ids stands in for a disk that is full."""
    params = change(tiny_corpus, prepare={"shard_rows": 4, "k": 128})
    commits = params.paths.logits / "train" / "commits"

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))

    command = [sys.executable, str(ROOT / "stages/prepare.py"), "--params"]
    command += [str(tmp_path / "params.yaml"), "--set", "prepare.shard_rows=4"]
    command += ["--set", "prepare.k=128"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "0 of 24 shards are committed and safe; fix that" in done.stderr
    assert not list(commits.glob("0*.json"))
    with pytest.raises(MismatchError, match="is not captured"):
        open_cache(params)
    capture_all(params)
    open_cache(params).top_k(np.array([0]))


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission is denied"),
        (errno.EIO, "the disk reports an input/output error"),
        (errno.ESTALE, "the network file system lost track of the file"),
    ],
)
def test_write_failure_says_what_is_safe(
    number: int, what: str, tiny_corpus: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CacheWriter.write

    def failing(self: CacheWriter, shard: int, *rest: object) -> None:
        if shard == 2:
            raise OSError(number, os.strerror(number))
        write(self, shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CacheWriter, "write", failing)
    with pytest.raises(DecantError, match=f": {what}: 2 of 6 shards are committed and safe"):
        capture_all(tiny_corpus)
    monkeypatch.undo()
    assert capture_all(tiny_corpus)[0].shards_done == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tiny_corpus: Params) -> None:
    tiny_corpus.paths.logits.mkdir()
    tiny_corpus.paths.logits.chmod(0o500)
    with pytest.raises(DecantError, match="permission is denied"):
        capture_all(tiny_corpus)


def test_each_document_is_captured_as_if_alone(tiny_corpus: Params) -> None:
    """Under documents; under packed it is so for a row's first document only."""
    rows = CorpusSplit(tiny_corpus.paths.corpus, "train").rows(0, 20)
    row = next(i for i, ids in enumerate(rows.doc_ids) if ids[0] != ids[-1])
    first = rows.doc_ids[row] == rows.doc_ids[row, 0]
    second = rows.doc_ids[row] == rows.doc_ids[row, first.sum()]
    teacher = live_teacher(tiny_corpus)
    for document_mask in (True, False):
        params = change(
            tiny_corpus,
            prepare={"document_mask": document_mask},
            paths={"logits": f"{tiny_corpus.paths.logits}_{document_mask}"},
        )
        capture_all(params)
        stored = open_cache(params).top_k(np.array([row]))
        for place, as_if_alone in ((first, True), (second, document_mask)):
            tokens = torch.from_numpy(rows.tokens[row][place])[None]
            alone = teacher.top_k(tokens, 16, (1.0, 2.0, 4.0))
            there = stored[:, place]
            off = (there.lse_tau - alone.lse_tau)[there.has_target].abs().max()
            same = bool(off < 1.5e-4)  # rounded to 1/4096 nat
            assert same == as_if_alone


def test_fingerprint_names_all_that_matters(tiny_corpus: Params) -> None:
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    fingerprint = fingerprint_of(tiny_corpus, corpus, torch.float32)
    assert fingerprint.vocab_size == 300  # tokenizer ids, not the model's 320 rows
    assert fingerprint.corpus_sha256 == corpus.info.sha256
    assert len(fingerprint.teacher_sha256) == 64
