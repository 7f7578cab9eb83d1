"""The cache as a whole: what is written is read, and what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows
from pipeline.errors import MismatchError
from tests.helpers import capture_all, change, live_teacher, open_cache


def test_rows_in_any_order_are_what_the_teacher_said(tiny_cache: Params) -> None:
    reader = open_cache(tiny_cache)
    corpus = CorpusSplit(tiny_cache.paths.corpus, "train")
    rows = np.array([len(corpus) - 1, 0, 17, 16, 15])
    found = Rows.cat([corpus.rows(row, row + 1) for row in rows])
    tokens, doc_ids = torch.from_numpy(found.tokens), torch.from_numpy(found.doc_ids)
    params = tiny_cache.prepare
    live = live_teacher(tiny_cache).top_k(tokens, params.k, params.temperatures, doc_ids=doc_ids)
    stored = reader.top_k(rows)
    torch.testing.assert_close(stored.logprobs, live.logprobs, atol=0, rtol=2**-10)
    torch.testing.assert_close(stored.lse, live.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored.lse_tau, live.lse_tau, atol=1e-5, rtol=1e-5)
    assert float((stored.ids == live.ids).float().mean()) > 0.999  # near ties may swap
    assert bool((live.ids < 300).all())  # never a padding row of the 320


def test_a_foreign_reader_needs_only_the_specification(tiny_cache: Params) -> None:
    """Plain zarr and three lines of logit_cache/format.py: a running sum, an addition, a table."""
    group = zarr.open_group(tiny_cache.paths.logits, path="train", mode="r")
    steps = np.asarray(group["logprob_deltas"][3:5])
    logprobs = np.cumsum(steps, axis=-1, dtype=np.uint16).view(np.float16).astype(np.float32)
    table = np.asarray(group[group.attrs["decant"]["id_order"]][:])
    ours = open_cache(tiny_cache).top_k(np.array([3, 4]))
    assert np.array_equal(logprobs, ours.logprobs.numpy())
    assert np.array_equal(table[np.asarray(group["id_indices"][3:5])], ours.ids.numpy())
    assert np.array_equal(np.asarray(group["lse"][3:5]), ours.lse.numpy())


def test_first_k_of_the_stored_ids(tiny_cache: Params) -> None:
    rows = np.array([1, 2])
    whole, short = open_cache(tiny_cache).top_k(rows), open_cache(tiny_cache, k=5).top_k(rows)
    assert torch.equal(short.ids, whole.ids[..., :5])
    with pytest.raises(MismatchError, match=r"k=17 ids are wanted, .* stores 16"):
        open_cache(tiny_cache, k=17)


def test_absent_cache(tiny_corpus: Params) -> None:
    with pytest.raises(MismatchError, match=r"does not exist: run stages/prepare\.py"):
        open_cache(tiny_corpus)


def test_a_shard_without_marker_does_not_exist(tiny_cache: Params) -> None:
    (tiny_cache.paths.logits / "train" / "commits" / "000001.json").unlink()
    with pytest.raises(MismatchError, match=r"shard 1 of 6 .* is not captured"):
        open_cache(tiny_cache)


def test_another_corpus_is_refused(tiny_cache: Params) -> None:
    other = change(tiny_cache, corpus={"train_tokens": 2000})
    build_corpus(other.corpus, other.paths.teacher, other.paths.corpus)
    with pytest.raises(MismatchError, match="captured with corpus_sha256="):
        open_cache(other)


def test_newer_format_is_refused(tiny_cache: Params) -> None:
    file = tiny_cache.paths.logits / "train" / "zarr.json"
    values = json.loads(file.read_text())
    values["attributes"]["decant"]["format_version"] = 2
    file.write_text(json.dumps(values))
    with pytest.raises(MismatchError, match="has format version 2, this program reads 1"):
        open_cache(tiny_cache)


def test_something_else_in_its_place_is_refused(tiny_corpus: Params) -> None:
    folder = Path(tiny_corpus.paths.logits / "train")
    zarr.create_group(folder)
    with pytest.raises(MismatchError, match="was not written by Decant"):
        open_cache(tiny_corpus)
    shutil.rmtree(folder)


def test_prefix_of_k_is_refused_beside_draws(tiny_corpus: Params) -> None:
    params = change(tiny_corpus, prepare={"k": 8, "num_sampled": 4})
    capture_all(params)
    assert open_cache(params, k=8).top_k(np.array([0])).num_sampled == 4
    with pytest.raises(MismatchError, match=r"sampled ids of .* were taken outside its 8"):
        open_cache(params, k=4)
