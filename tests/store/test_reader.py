"""The cache as a whole: what is written is read, and what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.rows import CorpusSplit
from pipeline.errors import MismatchError
from pipeline.store.reader import epoch_order
from tests.conftest import change
from tests.helpers import live_teacher, open_cache


def test_rows_in_any_order_are_what_the_teacher_said(tiny_cache: Params) -> None:
    reader = open_cache(tiny_cache)
    corpus = CorpusSplit(tiny_cache.paths.corpus, "train")
    rows = np.array([len(corpus) - 1, 0, 17, 16, 15])
    tokens = np.concatenate([corpus.rows(row, row + 1).tokens for row in rows])
    params = tiny_cache.prepare
    live = live_teacher(tiny_cache).top_k(torch.from_numpy(tokens), params.k, params.temperatures)
    stored = reader.top_k(rows)
    torch.testing.assert_close(stored.logprobs, live.logprobs, atol=0, rtol=2**-10)
    torch.testing.assert_close(stored.lse, live.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored.lse_tau, live.lse_tau, atol=1e-5, rtol=1e-5)
    assert float((stored.ids == live.ids).float().mean()) > 0.999  # near ties may swap
    assert bool((live.ids < 300).all())  # never a padding row of the 320


def test_a_foreign_reader_needs_only_the_specification(tiny_cache: Params) -> None:
    """Plain zarr and the four lines of store/schema.py: a running sum and an addition."""
    group = zarr.open_group(tiny_cache.paths.logits, path="train", mode="r")
    steps = np.asarray(group["logprobs"][3:5])
    logprobs = np.cumsum(steps, axis=-1, dtype=np.uint16).view(np.float16).astype(np.float32)
    ours = open_cache(tiny_cache).top_k(np.array([3, 4]))
    assert np.array_equal(logprobs, ours.logprobs.numpy())
    assert np.array_equal(np.asarray(group["ids"][3:5]), ours.ids.numpy())


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


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete"])
def test_files_of_another_size_are_named(damage: str, tiny_cache: Params) -> None:
    file = tiny_cache.paths.logits / "train" / "ids" / "c" / "2" / "0" / "0"
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    with pytest.raises(MismatchError, match=r"ids/c/2/0/0 has \d+ bytes, its marker says"):
        open_cache(tiny_cache)


def test_flipped_bits_are_found(tiny_cache: Params) -> None:
    file = tiny_cache.paths.logits / "train" / "logprobs" / "c" / "0" / "0" / "0"
    content = bytearray(file.read_bytes())
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(content), 20):
        damaged = content.copy()
        damaged[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(MismatchError, match="damaged"):
            open_cache(tiny_cache).top_k(np.arange(16))
    file.write_bytes(content)
    open_cache(tiny_cache).top_k(np.arange(16))


def test_another_corpus_is_refused(tiny_cache: Params) -> None:
    other = change(tiny_cache, corpus={"train_tokens": 2000})
    build_corpus(other.corpus, other.paths.teacher, other.paths.corpus)
    with pytest.raises(MismatchError, match="captured with corpus_sha256="):
        open_cache(other)


def test_a_token_changed_under_the_cache_is_found(tiny_cache: Params) -> None:
    array = zarr.open_group(tiny_cache.paths.corpus, path="train", mode="r+")["tokens"]
    array[20, 3] = (int(np.asarray(array[20, 3])) + 1) % 300
    reader = open_cache(tiny_cache)
    reader.top_k(np.array([0]))  # shard 0 is untouched
    with pytest.raises(MismatchError, match=r"shard 1 .* other tokens than rows 16\.\.32"):
        reader.top_k(np.array([20]))


def test_swapped_shards_are_found(tiny_cache: Params) -> None:
    commits = tiny_cache.paths.logits / "train" / "commits"
    first, second = commits / "000000.json", commits / "000001.json"
    one, two = json.loads(first.read_text()), json.loads(second.read_text())
    one["tokens_sha256"], two["tokens_sha256"] = two["tokens_sha256"], one["tokens_sha256"]
    first.write_text(json.dumps(one))
    with pytest.raises(MismatchError, match="other tokens"):
        open_cache(tiny_cache).top_k(np.array([0]))


def test_newer_format_is_refused(tiny_cache: Params) -> None:
    file = tiny_cache.paths.logits / "train" / "zarr.json"
    values = json.loads(file.read_text())
    values["attributes"]["decant"]["format_version"] = 2
    file.write_text(json.dumps(values))
    with pytest.raises(MismatchError, match="cache format 2, this program reads 1"):
        open_cache(tiny_cache)


def test_something_else_in_its_place_is_refused(tiny_corpus: Params) -> None:
    folder = Path(tiny_corpus.paths.logits / "train")
    folder.mkdir(parents=True)
    with pytest.raises(MismatchError, match="is not a logit cache"):
        open_cache(tiny_corpus)
    shutil.rmtree(folder)


@given(
    rows=st.integers(1, 300),
    chunk=st.integers(1, 40),
    window=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_each_row_once_an_epoch_and_reproducible(
    rows: int, chunk: int, window: int, seed: int
) -> None:
    def order(epoch: int) -> np.ndarray:
        return epoch_order(rows, chunk_rows=chunk, window_chunks=window, seed=seed, epoch=epoch)

    assert sorted(order(0).tolist()) == list(range(rows))
    assert np.array_equal(order(3), order(3))
    if rows > 50:
        assert not np.array_equal(order(0), order(1))


def test_a_window_needs_only_its_chunks() -> None:
    order = epoch_order(160, chunk_rows=8, window_chunks=4, seed=1, epoch=0)
    for first in range(0, 160, 32):
        assert len({int(row) // 8 for row in order[first : first + 32]}) == 4
