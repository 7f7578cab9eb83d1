"""The online teacher beside the student."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.target_sources.online import OnlineTargets
from pipeline.target_sources.target_source import Place
from pipeline.targets.topk import TopK
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.batches import BatchStream
from tests.helpers import live_teacher


def test_on_a_cpu_it_keeps_to_the_consumers_thread(tiny_corpus: Params) -> None:
    """Its matrix products set a precision for the whole process, the student's included."""
    threads = set()

    class Watched(OnlineTargets):
        def targets(self, places: list[Place], tokens: Tensor) -> TopK:
            threads.add(threading.current_thread())
            return super().targets(places, tokens)

    split = CorpusSplit(tiny_corpus.paths.corpus, "train")
    teacher = Watched(
        live_teacher(tiny_corpus),
        split,
        k=4,
        num_sampled=0,
        seed=0,
        temperatures=(),
        shard_rows=16,
        document_mask=True,
    )
    batches = BatchStream(teacher, batch_rows=4, window_shards=2, seed=0).starting_at(0)
    for _ in range(3):
        next(batches)
    batches.close()
    assert threads == {threading.main_thread()}


@pytest.mark.gpu
def test_on_a_gpu_a_stream_of_its_own_gives_the_same(tiny_corpus: Params) -> None:
    split = CorpusSplit(tiny_corpus.paths.corpus, "train")
    live = HuggingFaceTeacher(
        tiny_corpus.paths.teacher,
        vocab_size=split.info.vocab_size,
        dtype=torch.float32,
        device=torch.device("cuda"),
    )
    teacher = OnlineTargets(
        live,
        split,
        k=4,
        num_sampled=0,
        seed=0,
        temperatures=(2.0,),
        shard_rows=16,
        document_mask=False,
    )
    assert teacher.in_background
    stream = BatchStream(teacher, batch_rows=4, window_shards=2, seed=0)
    batches = stream.starting_at(0)
    for number in range(5):
        batch = next(batches)
        rows = split.rows(0, len(split)).tokens[stream.rows_of(number)]
        alone = live.top_k(torch.from_numpy(rows), 4, (2.0,))
        assert batch.topk is not None
        torch.testing.assert_close(batch.topk.lse_tau, alone.lse_tau)
        assert torch.equal(batch.topk.ids, alone.ids)
    batches.close()
