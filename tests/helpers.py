"""Steps that several tests take."""

from __future__ import annotations

import torch

from pipeline.capture import CaptureResult, capture, fingerprint_of
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


def capture_all(params: Params) -> list[CaptureResult]:
    """What stages/prepare.py does, as a call."""
    teacher = live_teacher(params)
    results = []
    for split in SPLITS:
        corpus = CorpusSplit(params.paths.corpus, split)
        dtype = DTYPES[params.prepare.dtype]
        fingerprint = fingerprint_of(params.paths.teacher, corpus, params.prepare, dtype)
        results.append(capture(teacher, corpus, fingerprint, params.paths.logits, params.prepare))
    return results


def open_cache(params: Params, split: str = "train", k: int | None = None) -> CacheReader:
    """A reader of the cache bound to its corpus."""
    return CacheReader(params.paths.logits, CorpusSplit(params.paths.corpus, split), k=k)
