"""Corpus -> teacher -> cache: one split, shard by shard, continued where it stopped."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import PrepareParams
from pipeline.data.rows import CorpusSplit, hash_rows
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.model.weights import hash_tokenizer, hash_weights
from pipeline.runtime import dtype_name, progress_bar
from pipeline.store.codec import encode
from pipeline.store.schema import FORMAT_VERSION, Fingerprint
from pipeline.store.writer import CacheWriter
from pipeline.teacher.hf import HuggingFaceTeacher
from pipeline.topk import TopK


@dataclass(frozen=True, kw_only=True)
class CaptureResult:
    """What a capture did."""

    shards: int  # in the complete cache
    shards_done: int  # by this call; the rest was there before
    tokens_done: int


def fingerprint_of(
    teacher: Path, corpus: CorpusSplit, params: PrepareParams, dtype: torch.dtype
) -> Fingerprint:
    """The fingerprint of the cache that these inputs make.

    Raises:
        MismatchError: the corpus was tokenized with another tokenizer.
        ParamsError: K exceeds the vocabulary.
    """
    info = corpus.info
    tokenizer_sha256 = hash_tokenizer(teacher)
    if tokenizer_sha256 != info.tokenizer_sha256:
        raise MismatchError(
            f"{corpus.path} was tokenized with tokenizer {info.tokenizer_sha256[:12]}, {teacher} "
            f"holds {tokenizer_sha256[:12]}: run stages/corpus.py again"
        )
    if params.k > info.vocab_size:
        raise ParamsError(
            f"prepare.k={params.k} exceeds the {info.vocab_size} ids of the vocabulary: lower it"
        )
    return Fingerprint(
        format_version=FORMAT_VERSION,
        teacher_sha256=hash_weights(teacher),
        tokenizer_sha256=tokenizer_sha256,
        corpus_sha256=info.sha256,
        dtype=dtype_name(dtype),
        attention="packed",
        k=params.k,
        temperatures=params.temperatures,
        vocab_size=info.vocab_size,
        num_rows=info.num_rows,
        row_length=info.row_length,
    )


def capture(
    teacher: HuggingFaceTeacher,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    path: Path,
    params: PrepareParams,
) -> CaptureResult:
    """Capture every shard that is not committed yet.

    A writer thread compresses and syncs one shard while the teacher works on the next. On any
    error, Ctrl-C included, the shard under way is dropped and committed ones stay.

    Raises:
        DecantError: the disk is full or not writable; says how many shards are safe.
    """
    writer = CacheWriter(
        path / corpus.split,
        fingerprint,
        chunk_rows=params.chunk_rows,
        shard_rows=params.shard_rows,
    )
    missing = writer.missing()
    tokens_done = 0
    pending: Future[None] | None = None
    total = sum((end - start) for start, end in map(writer.rows_of, missing))
    bar = progress_bar(
        what=f"prepare {corpus.split}", total=total * fingerprint.row_length, unit="tok"
    )
    with bar, ThreadPoolExecutor(max_workers=1) as thread, _disk_errors(writer):
        for shard in missing:
            rows = corpus.rows(*writer.rows_of(shard))
            parts: list[TopK] = []
            for tokens in torch.split(torch.from_numpy(rows.tokens), params.batch_rows):
                topk = teacher.top_k(tokens, params.k, params.temperatures)
                parts.append(topk.map(torch.Tensor.cpu))
                bar.update(tokens.numel())
            if pending is not None:
                pending.result()
            pending = thread.submit(_write, writer, shard, TopK.cat(parts), hash_rows(rows).hex())
            tokens_done += rows.tokens.size
        if pending is not None:
            pending.result()
    return CaptureResult(
        shards=writer.num_shards, shards_done=len(missing), tokens_done=tokens_done
    )


def _write(writer: CacheWriter, shard: int, topk: TopK, tokens_sha256: str) -> None:
    writer.write(shard, encode(topk), tokens_sha256)


@contextmanager
def _disk_errors(writer: CacheWriter) -> Iterator[None]:
    """A full or read-only disk as one sentence; what is committed stays."""
    try:
        yield
    except OSError as error:
        done = writer.num_shards - len(writer.missing())
        what = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the file size limit is reached",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission is denied",
        }.get(error.errno or 0, error.strerror or str(error))
        raise DecantError(
            f"writing {writer.path} failed, {what}: {done} of {writer.num_shards} shards are "
            "committed and safe; make room and run the same command to continue"
        ) from error
