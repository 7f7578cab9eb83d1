"""The teacher on a GPU or the stand-in for one: the CPU's targets, and few waits a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.capture.capture import Capture
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.target_sources.online import OnlineTargets
from pipeline.targets.reduce import row_uniforms
from pipeline.targets.topk import TopK
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.batches import BatchStream
from tests.fakecuda import stand_in
from tests.helpers import make_capture

MOST_SYNCS = 2
"""Waits of the host for a batch of two chunks, with documents kept apart, results on the CPU: for
the result, and one of transformers', which looks for packed documents."""
MOST_PAGEABLE_COPIES = 0

TAUS = (1.0, 2.0)
B, L, V, K = 2, 12, 300, 8  # few rows, since interpreted kernels take 0.1 s for each


def teacher(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> HuggingFaceTeacher:
    return HuggingFaceTeacher(
        folder, vocab_size=V, dtype=dtype, device=torch.device(device), head_chunk=B * L // 2
    )


def rows(documents: bool, num_sampled: int) -> tuple[torch.Tensor, ...]:
    doc_ids = torch.zeros(B, L, dtype=torch.int32)
    doc_ids[:, L // 3 :] = 1
    uniforms = row_uniforms(range(B), L, num_sampled, 0)
    return torch.randint(0, V, (B, L)), uniforms, doc_ids if documents else None


def require_same(found: TopK, expected: TopK) -> None:
    assert found.lse.device.type == "cuda"
    found = found.map(torch.Tensor.cpu)
    for name in ("logprobs", "lse", "lse_tau", "entropy", "sampled_logprobs"):
        one, two = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("num_sampled", [0, 5])
@pytest.mark.parametrize("documents", [False, True], ids=["whole rows", "documents apart"])
def test_targets_are_the_cpus(documents: bool, num_sampled: int, teacher_folder: Path) -> None:
    tokens, uniforms, doc_ids = rows(documents, num_sampled)
    found, expected = (
        teacher(teacher_folder, device).top_k(tokens, K, TAUS, uniforms, doc_ids)
        for device in ("cuda", "cpu")
    )
    require_same(found, expected)


@pytest.mark.parametrize("document_mask", [False, True])
def test_an_online_teacher_works_ahead(document_mask: bool, tiny_corpus: Params) -> None:
    split = CorpusSplit(tiny_corpus.paths.corpus, "train")
    streams = []
    for device in ("cuda", "cpu"):
        targets = OnlineTargets(
            teacher(tiny_corpus.paths.teacher, device),
            split,
            k=K,
            num_sampled=0,
            seed=0,
            temperatures=TAUS,
            shard_rows=16,
            document_mask=document_mask,
        )
        assert targets.in_background == (device == "cuda")
        stream = BatchStream(
            targets, batch_rows=1, window_shards=2, seed=0, pin=targets.in_background
        )
        streams.append(stream.starting_at(0))
    for _ in range(2):
        found, expected = (next(stream) for stream in streams)
        assert found.topk is not None
        assert expected.topk is not None
        require_same(found.topk, expected.topk)
        assert found.tokens.is_pinned()
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_batch_waits_rarely(dtype: torch.dtype, tiny_corpus: Params) -> None:
    made = make_capture(tiny_corpus, "train")
    model = teacher(tiny_corpus.paths.teacher, "cuda", dtype)
    model.head_chunk = 256
    capture = Capture(model, made.corpus, made.fingerprint, made.writer, batch_rows=16)
    start, stop = made.writer.layout.rows_of(0)
    doc_ids = made.corpus.rows(start, stop).doc_ids
    assert stop - start == 16
    assert (doc_ids[:, 0] != doc_ids[:, -1]).any()
    with stand_in.without_kernels():
        capture.compute(0)  # the first batch finds out whether documents can be kept apart
        with stand_in.counting() as counts:
            capture.compute(0)
    stand_in.show(f"a batch of capture in {dtype}", counts)
    assert stand_in.total(counts, "sync") <= MOST_SYNCS
    assert stand_in.total(counts, "pageable") <= MOST_PAGEABLE_COPIES
