"""The cache as a whole: what is written is read, and what does not belong together is refused."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, Rows, next_token_labels
from pipeline.errors import MismatchError
from tests.helpers import ROOT, capture_all, change, live_teacher, open_cache


def test_rows_in_any_order_are_what_the_teacher_said(tiny_cache: Params) -> None:
    reader = open_cache(tiny_cache)
    corpus = CorpusSplit(tiny_cache.paths.corpus, "train")
    rows = np.array([len(corpus) - 1, 0, 17, 16, 15])
    found = Rows.cat([corpus.rows(row, row + 1) for row in rows])
    tokens, doc_ids = torch.from_numpy(found.tokens), torch.from_numpy(found.doc_ids)
    params = tiny_cache.prepare
    live = live_teacher(tiny_cache).top_k(tokens, params.k, params.temperatures, doc_ids=doc_ids)
    stored = reader.top_k(rows)
    labels = next_token_labels(tokens, doc_ids, torch.from_numpy(found.in_loss))
    assert torch.equal(stored.has_target, labels != IGNORE)
    stored, live = stored[stored.has_target], live[stored.has_target]
    torch.testing.assert_close(stored.logprobs, live.logprobs, atol=0, rtol=2**-10)
    torch.testing.assert_close(stored.lse, live.lse, atol=0, rtol=2**-10)
    torch.testing.assert_close(stored.lse_tau, live.lse_tau, atol=1.3e-4, rtol=0)
    torch.testing.assert_close(stored.entropy, live.entropy, atol=1.3e-4, rtol=0)
    assert float((stored.ids == live.ids).float().mean()) > 0.999  # near ties may swap
    assert bool((live.ids < 300).all())  # never a padding row of the 320


@pytest.mark.parametrize(
    "prepare",
    [
        {},
        {"top_p": 0.3, "temperatures": [0.5, 1.0]},
        {"k": 0, "num_sampled": 12, "temperatures": [1.0]},
        {"k": 5, "num_sampled": 9, "positions": "high_entropy"},
    ],
    ids=str,
)
def test_a_foreign_reader_needs_only_the_specification(
    tiny_corpus: Params, prepare: dict[str, Any]
) -> None:
    """The reader in docs/, in plain zarr and NumPy, finds what ours does, chunk by chunk."""
    params = change(tiny_corpus, prepare=prepare)
    capture_all(params)
    reader = open_cache(params)
    group = zarr.open_group(params.paths.logits, path="train", mode="r")
    read_chunk = runpy.run_path(str(ROOT / "docs" / "read_cache.py"))["read_chunk"]
    chunk_rows = reader.layout.chunk_rows
    for chunk in range(-(-len(reader.corpus) // chunk_rows)):
        last = min((chunk + 1) * chunk_rows, len(reader.corpus))
        ours = reader.top_k(np.arange(chunk * chunk_rows, last)).map(lambda t: t.flatten(0, 1))
        theirs = {name: torch.from_numpy(v.copy()) for name, v in read_chunk(group, chunk).items()}
        assert torch.equal(theirs["lse"].float(), ours.lse)
        assert torch.equal(theirs["entropy"].float(), ours.entropy)
        for j, tau in enumerate(ours.temperatures):
            torch.testing.assert_close(theirs[f"lse_at_{tau:g}"].float(), ours.lse_tau[:, j])
        kept, used = ours.is_kept, ours.sampled_counts > 0
        if ours.k:
            width = theirs["ids"].shape[-1]  # the most that a position of this chunk has
            assert not bool(kept[:, width:].any())
            assert torch.equal(theirs["logprobs"].float(), ours.logprobs[:, :width])
            assert torch.equal(theirs["ids"].long()[kept[:, :width]], ours.ids[kept])
        if ours.num_sampled:
            width = theirs["sampled_ids"].shape[-1]
            assert not bool(used[:, width:].any())
            assert torch.equal(theirs["sampled_counts"].int(), ours.sampled_counts[:, :width])
            assert torch.equal(
                theirs["sampled_ids"].long()[used[:, :width]], ours.sampled_ids[used]
            )


def test_high_entropy_keeps_the_upper_half_of_each_row(tiny_corpus: Params) -> None:
    capture_all(tiny_corpus)
    rows = np.arange(len(CorpusSplit(tiny_corpus.paths.corpus, "train")))
    whole = open_cache(tiny_corpus).top_k(rows)
    chosen = change(
        tiny_corpus,
        prepare={"positions": "high_entropy", "entropy_quantile": 0.5},
        paths={"logits": f"{tiny_corpus.paths.logits}_chosen"},
    )
    capture_all(chosen)
    half = open_cache(chosen).top_k(rows)
    for row in range(len(rows)):
        there, kept = whole.has_target[row], half.has_target[row]
        assert kept.sum() == -(-int(there.sum()) // 2)
        if kept.any() and (there & ~kept).any():
            out = whole.entropy[row][there & ~kept]
            assert whole.entropy[row][kept].min() >= out.max()
        assert torch.equal(half.ids[row][kept], whole.ids[row][kept])


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
