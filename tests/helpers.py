"""Steps that several tests take."""

from __future__ import annotations

import torch

from pipeline.capture import Capture, CaptureResult, fingerprint_of
from pipeline.config import Params
from pipeline.data.rows import SPLITS, CorpusSplit
from pipeline.runtime import DTYPES
from pipeline.store.reader import CacheReader
from pipeline.teacher.hf import HuggingFaceTeacher


def live_teacher(params: Params) -> HuggingFaceTeacher:
    """The teacher of params on the CPU."""
    return HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=CorpusSplit(params.paths.corpus, "train").info.vocab_size,
        dtype=DTYPES[params.prepare.dtype],
        device=torch.device("cpu"),
        head_chunk=params.prepare.head_chunk,
    )


def make_capture(params: Params, split: str, *, repair: bool = False) -> Capture:
    """The capture of one split as stages/prepare.py makes it."""
    corpus = CorpusSplit(params.paths.corpus, split)
    fingerprint = fingerprint_of(params, corpus, DTYPES[params.prepare.dtype])
    return Capture(live_teacher(params), corpus, fingerprint, params, repair=repair)


def capture_all(params: Params, *, repair: bool = False) -> list[CaptureResult]:
    """What stages/prepare.py does, as a call."""
    results = []
    for split in SPLITS:
        capture = make_capture(params, split, repair=repair)
        results.append(capture.run(capture.writer.missing()))
    return results


def open_cache(params: Params, split: str = "train", k: int | None = None) -> CacheReader:
    """A reader of the cache bound to its corpus."""
    return CacheReader(params.paths.logits, CorpusSplit(params.paths.corpus, split), k=k)
