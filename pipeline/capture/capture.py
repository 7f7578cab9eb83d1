"""The capture of one split: corpus -> teacher -> cache, shard by shard.

A capture is a set of shards that are not committed yet. Any number of processes or machines may
each take a part of them (`pipeline/capture/local.py`, `pipeline/capture/ray.py`), because the
fingerprint, the cache's id order and the shard's number determine the contents of a shard on
machines that round alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, hash_rows
from pipeline.data.packing import Rows, positions_in_loss
from pipeline.data.vocabulary import require_tokenizer
from pipeline.errors import DecantError, MismatchError, ParamsError, accident
from pipeline.io.address import Address
from pipeline.io.checked_json import DamagedError
from pipeline.io.folders import open_folder
from pipeline.io.hub_folder import require_writable
from pipeline.io.ownership import lock, require_ours
from pipeline.logit_cache.codec import IdOrder
from pipeline.logit_cache.format import FORMAT_VERSION, Fingerprint
from pipeline.logit_cache.growth import extend_cache, is_beginning
from pipeline.logit_cache.integrity import Damage, repair_cache
from pipeline.logit_cache.layout import load_layout, remove_cache
from pipeline.logit_cache.writer import CacheWriter, create_cache, has_cache
from pipeline.model.attention_mask import documents_apart
from pipeline.model.folder import hash_weights, teacher_folder
from pipeline.model.named_models import teacher_model
from pipeline.runtime.batch_sizes import resolve_batch_rows
from pipeline.runtime.console import progress_bar, say
from pipeline.runtime.device import dtype_name, pick_device, seconds_of
from pipeline.targets.reduce import row_uniforms
from pipeline.targets.topk import TopK
from pipeline.teacher.engines import describe_engine, open_teacher, teacher_dtype
from pipeline.teacher.teacher import Teacher

COUNTED_ROWS = 8  # rows whose kept ids make the id order; 32 would save 0.6 more bytes per token


@dataclass(frozen=True, kw_only=True)
class CaptureResult:
    """The outcome of a capture."""

    shards: int  # in the complete cache
    shards_done: int  # by this call; the others existed before or belong to another process
    shards_missing: int  # still missing when this call ended
    tokens_done: int


def fingerprint_of(
    params: Params, corpus: CorpusSplit, dtype: torch.dtype, *, engine: str | None = None
) -> Fingerprint:
    """Return the fingerprint of the cache that these parameters produce from a corpus.

    Args:
        engine: what runs the teacher; None describes the engine of these parameters.

    Raises:
        MismatchError: the corpus was tokenized with another tokenizer.
        ParamsError: K exceeds the vocabulary.
    """
    info = corpus.info
    teacher, wanted = teacher_folder(params.paths.teacher), params.prepare
    require_tokenizer(teacher, corpus)
    if wanted.k > info.vocab_size:
        raise ParamsError(
            f"prepare.k={wanted.k} exceeds the {info.vocab_size} ids of the vocabulary: lower it"
        )
    return Fingerprint(
        format_version=FORMAT_VERSION,
        teacher_sha256=hash_weights(teacher),
        tokenizer_sha256=info.tokenizer_sha256,
        corpus_sha256=info.sha256,
        dtype=dtype_name(dtype),
        engine=describe_engine(params) if engine is None else engine,
        document_mask=wanted.document_mask,
        k=wanted.k,
        num_sampled=wanted.num_sampled,
        sampling_seed=params.seed if wanted.num_sampled else 0,
        temperatures=wanted.stored_temperatures,
        top_p=wanted.top_p,
        entropy_quantile=wanted.stored_quantile,
        vocab_size=info.vocab_size,
        num_rows=info.num_rows,
        row_length=info.row_length,
    )


class Capture:
    """The capture of one split: its teacher, its corpus, and the cache being written.

    Args:
        teacher: in the fingerprint's number format.
        fingerprint: describes what the cache is made from.
        batch_rows: rows per forward of the teacher.
        repaired: damages that were repaired before the capture.
    """

    def __init__(
        self,
        teacher: Teacher,
        corpus: CorpusSplit,
        fingerprint: Fingerprint,
        writer: CacheWriter,
        *,
        batch_rows: int,
        repaired: tuple[Damage, ...] = (),
    ) -> None:
        self.teacher = teacher
        self.corpus = corpus
        self.fingerprint = fingerprint
        self.writer = writer
        self.repaired = repaired
        self._batch_rows = batch_rows

    def run(self, shards: list[int]) -> CaptureResult:
        """Capture the given shards, all of which must be missing.

        A writer thread compresses and syncs one shard while the teacher works on the next. On any
        error, Ctrl-C included, the current shard is dropped and committed ones stay.

        Raises:
            DecantError: the disk is full or not writable; the message says how many shards are
                safe.
        """
        tokens = self.tokens_of(shards)
        bar = progress_bar(what=f"prepare {self.corpus.split}", total=tokens, unit="tok")
        pending: Future[None] | None = None
        with bar, ThreadPoolExecutor(max_workers=1) as thread, disk_errors("", self.writer):
            for computed in self._computed(shards, bar):
                if pending is not None:
                    pending.result()
                pending = thread.submit(self.write, computed)
            if pending is not None:
                pending.result()
        return CaptureResult(
            shards=self.writer.layout.num_shards,
            shards_done=len(shards),
            shards_missing=len(self.writer.missing()),
            tokens_done=tokens,
        )

    def tokens_of(self, shards: list[int]) -> int:
        """Return the number of tokens to capture in these missing shards, padding included."""
        bounds = map(self.writer.layout.rows_of, shards)
        rows = sum(stop - start for start, stop in bounds) - sum(
            map(self.writer.short_rows, shards)
        )
        return rows * self.fingerprint.row_length

    def compute(self, shard: int) -> ComputedShard:
        """Run the teacher on the rows of a shard."""
        [computed] = self._computed([shard])
        return computed

    def write(self, computed: ComputedShard) -> None:
        """Join the batches of a shard, compress and commit them."""
        topk = TopK.cat(computed.batches)
        self.writer.write(computed.shard, topk, hash_rows(computed.rows))

    def _computed(self, shards: list[int], bar: object | None = None) -> Iterator[ComputedShard]:
        """Yield what `compute` returns for each shard.

        A GPU is given its next batch, of the next shard too, before the result of this one is
        waited for, so that it always has work.
        """
        parts: list[TopK] = []
        for batch in _lagging(self._begun(shards), 1 if self.teacher.device.type == "cuda" else 0):
            parts.append(batch.result())
            if bar is not None and batch.is_new:
                bar.update(parts[-1].lse.numel())  # type: ignore[attr-defined]
            if batch.completes is not None:
                yield ComputedShard(batch.shard, parts, batch.completes)
                parts = []

    def _begun(self, shards: list[int]) -> Iterator[_Batch]:
        """Begin the batches of these shards, one each time one is asked for."""
        for shard in shards:
            start, stop = self.writer.layout.rows_of(shard)
            rows = self.corpus.rows(start, stop)
            stored = self.writer.read_short(shard, self.corpus)
            if stored is not None:  # a last shard that has got more rows
                yield _Batch(
                    shard=shard,
                    result=partial(_same, stored),
                    completes=rows if len(stored.lse) == len(rows) else None,
                    is_new=False,
                )
            num_stored = 0 if stored is None else len(stored.lse)
            for first in range(num_stored, stop - start, self._batch_rows):
                last = first + self._batch_rows >= stop - start
                yield _Batch(
                    shard=shard,
                    result=self._begin(rows[first : first + self._batch_rows], start + first),
                    completes=rows if last else None,
                )

    def seconds_per_token(self) -> float:
        """Time teacher and reduction on this machine, on one row, or on one batch on a GPU."""
        rows = self._batch_rows if self.teacher.device.type == "cuda" else 1
        batch = self.corpus.rows(0, min(rows, len(self.corpus)))
        seconds = seconds_of(lambda: self._begin(batch, 0)(), self.teacher.device)
        return seconds / batch.tokens.size

    def _begin(self, rows: Rows, first_row: int) -> Callable[[], TopK]:
        return begin_top_k_of(self.teacher, self.fingerprint, rows, first_row)


@dataclass(frozen=True)
class ComputedShard:
    """What the teacher said of a shard."""

    shard: int
    batches: list[TopK]  # [rows, L, ...] on the CPU
    rows: Rows  # of the corpus


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A batch of a shard that the teacher has begun."""

    shard: int
    result: Callable[[], TopK]  # waits for it
    completes: Rows | None  # the shard's rows, if it is the shard's last batch
    is_new: bool = True  # False: read from the cache


def _same(topk: TopK) -> TopK:
    return topk


def _lagging(batches: Iterator[_Batch], lag: int) -> Iterator[_Batch]:
    """Yield each batch once `lag` more have begun, or none is left."""
    waiting: deque[_Batch] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > lag:
            yield waiting.popleft()
    yield from waiting


def begin_top_k_of(
    teacher: Teacher, fingerprint: Fingerprint, rows: Rows, first_row: int
) -> Callable[[], TopK]:
    """Begin what a cache with this fingerprint stores for rows of the corpus.

    Args:
        first_row: number of the first of `rows` in the corpus.

    Returns:
        A function that waits for TopK [len(rows), L, ...] in CPU memory. Only positions in the loss
        have a target, and of these the ones that the entropy rule chooses.
    """
    numbers = range(first_row, first_row + len(rows))
    uniforms = row_uniforms(
        numbers, fingerprint.row_length, fingerprint.num_sampled, fingerprint.sampling_seed
    )
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    return teacher.begin_top_k(
        tokens,
        fingerprint.k,
        fingerprint.temperatures,
        uniforms,
        documents_apart(doc_ids, fingerprint.document_mask),
        top_p=fingerprint.top_p,
        wanted=positions_in_loss(rows),
        entropy_quantile=fingerprint.entropy_quantile,
    )


def make_id_order(teacher: Teacher, corpus: CorpusSplit, fingerprint: Fingerprint) -> IdOrder:
    """Make the id order of a new cache from the teacher's ids on a few evenly spaced rows."""
    number = min(COUNTED_ROWS, len(corpus))
    rows = (np.arange(number) * len(corpus) // number).tolist()
    parts = [begin_top_k_of(teacher, fingerprint, corpus.rows(row, row + 1), row)() for row in rows]
    return IdOrder.of(TopK.cat(parts))


def open_capture(
    teacher: Teacher,
    corpus: CorpusSplit,
    fingerprint: Fingerprint,
    params: Params,
    *,
    repair: bool = False,
) -> Capture:
    """Create the cache of one split, or open it to be continued.

    Args:
        repair: first check every committed shard and uncommit the damaged ones.

    Raises:
        MismatchError: the cache was made from something else; the message names it.
    """
    address, sizes = params.paths.logits, params.prepare
    shape = {"chunk_rows": sizes.chunk_rows, "shard_rows": sizes.shard_rows}
    id_order = partial(make_id_order, teacher, corpus, fingerprint)
    repaired: tuple[Damage, ...] = ()
    with disk_errors(str(address / corpus.split)):
        if (rows := extend_cache(address, corpus, fingerprint)) is not None:
            say(
                f"prepare: {address / corpus.split} holds the first {rows:,} of {len(corpus):,} "
                "rows, and gets those that were added to the corpus"
            )
        if repair:
            repaired = repair_cache(address, corpus, fingerprint, make_id_order=id_order, **shape)
        if not has_cache(address, corpus.split):
            create_cache(address, corpus.split, fingerprint, id_order=id_order(), **shape)
        writer = CacheWriter(address, corpus.split, fingerprint)
    return Capture(
        teacher,
        corpus,
        fingerprint,
        writer,
        batch_rows=resolve_batch_rows(
            params.capture.batch_rows, fingerprint.row_length, teacher.device.type
        ),
        repaired=repaired,
    )


def open_captures(
    params: Params, *, overwrite: bool = False, repair: bool = False
) -> list[Capture]:
    """Open the captures of all splits, with one teacher on this process's device.

    Args:
        overwrite: first delete the cache at paths.logits if it was made from something else;
            running the same command again continues what the first one began.
        repair: see open_capture.

    Raises:
        DecantError: see fingerprint_of, Teacher and open_capture.
    """
    teacher_model(params.paths.teacher)  # refuses before anything is deleted
    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    device = pick_device(params.device)
    dtype = teacher_dtype(params, device)
    fingerprints = [fingerprint_of(params, corpus, dtype) for corpus in corpora]
    require_ours(params.paths.logits, "logits", key="paths.logits")
    if overwrite:
        for corpus, wanted in zip(corpora, fingerprints, strict=True):
            address = params.paths.logits / corpus.split
            if other := _something_else(address, wanted, corpus):
                say(f"prepare: {other}, and is replaced by a new cache")
                remove_cache(open_folder(address))
    teacher = open_teacher(params, corpora[0].info.vocab_size, dtype, device)
    return [
        open_capture(teacher, corpus, fingerprint, params, repair=repair)
        for corpus, fingerprint in zip(corpora, fingerprints, strict=True)
    ]


def _something_else(address: Address, wanted: Fingerprint, corpus: CorpusSplit) -> str:
    """Describe how a split's cache differs from the wanted one; empty if it is that, or begins it.

    Raises:
        DecantError: the cache is too damaged to tell. It may hold hours of capture, so it is not
            deleted for that reason alone.
    """
    try:
        layout = load_layout(open_folder(address), str(address))
    except MismatchError as error:
        return str(error).partition(": ")[0]
    except DamagedError as error:
        raise DecantError(
            f"{address} is damaged ({error}), so nothing says what it was made from: remove "
            "it to capture it again"
        ) from None
    if layout and layout.fingerprint.imported_from:
        raise MismatchError(
            f"{address} was imported from {layout.fingerprint.imported_from}, and no capture "
            "replaces it: set paths.logits to another place, or remove it"
        )
    if layout and is_beginning(layout.fingerprint, wanted, corpus):
        return ""
    difference = layout and layout.fingerprint.difference(wanted)
    return f"{address} {difference}" if difference else ""


def lock_cache(params: Params, *, part: int = 1, parts: int = 1) -> AbstractContextManager[None]:
    """Exclude other processes that would write the same shards."""
    require_writable(params.paths.logits, key="paths.logits")
    remedy = "set paths.logits to another place, or share the work by --shards I/N"
    return lock(params.paths.logits, remedy, part=part, parts=parts)


def say_repaired(split: str, damages: tuple[Damage, ...]) -> None:
    """Print each damage on its own line."""
    for damage in damages:
        shard = "" if damage.shard is None else f"shard {damage.shard}: "
        say(f"prepare: {split} {shard}{damage.what}; repaired")


@contextmanager
def disk_errors(where: str, writer: CacheWriter | None = None) -> Iterator[None]:
    """Report a full or read-only disk as one sentence; committed shards stay."""
    try:
        yield
    except OSError as error:
        what = accident(error) or error.strerror or str(error)
        safe = ""
        if writer is not None:
            total = writer.layout.num_shards
            safe = f"{total - len(writer.missing())} of {total} shards are committed and safe; "
            where = str(writer.address)
        raise DecantError(
            f"capture to {where} stopped, {error.filename or 'the cache'}: {what}: {safe}fix that "
            "and run the same command to continue"
        ) from error
