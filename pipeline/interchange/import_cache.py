"""Write the documents and targets of another tool's capture as a corpus and a cache.

The source is read four times: once for its sha256, then once per split, when its tokens become rows
of the corpus, and last when its targets become shards of the cache. The last three passes see the
documents in the same order, so a document's number in the corpus says which targets are its own,
and only the documents of a few rows wait in memory for the shard that is next.

Shards are committed one by one, as in a capture, so an import that was interrupted continues at the
first missing shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.capture.capture import lock_cache
from pipeline.config.params import Params
from pipeline.config.source_params import CorpusParams
from pipeline.data.corpus_zarr import IMPORTED, SPLITS, CorpusSplit, hash_rows, read_made_from
from pipeline.data.packing import PADDING, Document, Rows, document_places, positions_in_loss
from pipeline.data.text_hashes import is_there
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.interchange.distillkit import Cleaned, DistillKitCapture, Targets
from pipeline.interchange.imported_corpus import Choice, write_corpus
from pipeline.io.address import Address
from pipeline.io.folders import open_folder
from pipeline.io.ownership import lock, require_ours
from pipeline.logit_cache.codec import IdOrder
from pipeline.logit_cache.format import FORMAT_VERSION, Fingerprint
from pipeline.logit_cache.layout import load_layout, remove_cache
from pipeline.logit_cache.writer import CacheWriter, create_cache, has_cache
from pipeline.model.folder import hash_tokenizer, teacher_folder
from pipeline.runtime.console import progress_bar, say
from pipeline.targets.topk import TopK


@dataclass(frozen=True)
class Imported:
    """The outcome of an import."""

    corpora: list[CorpusSplit]
    shards_done: int  # by this call; the others existed before
    cleaned: Cleaned
    k: int


def import_capture(
    params: Params, capture: DistillKitCapture, *, k: int | None = None, overwrite: bool = False
) -> Imported:
    """Import a capture into paths.corpus and paths.logits, or continue an import of it.

    Args:
        k: number of most probable ids to keep of each position; None keeps all.
        overwrite: replace the corpus and the cache that are there, whatever they were made from;
            since nothing of them is kept, this also repairs a damaged import.

    Raises:
        MismatchError: paths.corpus or paths.logits holds something else.
        ParamsError: k exceeds what the capture holds, or a document is longer than a row.
        DecantError: the capture was made with another tokenizer, or is damaged.
    """
    stored = capture.k
    if k is not None and k > stored:
        raise ParamsError(f"--k {k} exceeds the {stored} ids per position of the capture: lower it")
    paths = params.paths
    require_ours(paths.corpus, "corpus", key="paths.corpus")
    require_ours(paths.logits, "logits", key="paths.logits")
    with ExitStack() as stack:
        stack.enter_context(lock(paths.corpus, "set paths.corpus to another place"))
        stack.enter_context(lock_cache(params))
        teacher = teacher_folder(paths.teacher)
        source_sha256 = capture.sha256()
        made_from: dict[str, Any] = {
            IMPORTED: capture.name,
            "source_sha256": source_sha256,
            "tokenizer_sha256": hash_tokenizer(teacher),
            "settings": params.corpus.model_dump(mode="json", include=set(_SETTINGS))
            | {"packed_at_once": params.prepare.shard_rows},
        }
        is_same = is_there(paths.corpus) and read_made_from(paths.corpus) == made_from
        if overwrite or not is_same:
            if not overwrite:
                _require_free(paths.corpus, paths.logits)
            write_corpus(params, capture, teacher, made_from)
        else:
            say(f"convert: {paths.corpus} holds the documents already")
        corpora = [CorpusSplit(paths.corpus, split) for split in SPLITS]
        wanted = [_fingerprint(capture, corpus, source_sha256, k or stored) for corpus in corpora]
        if overwrite:
            for split in SPLITS:
                remove_cache(open_folder(paths.logits / split))
        fillers = [_Filler(params, *both) for both in zip(corpora, wanted, strict=True)]
        cleaned = _write_targets(params.corpus, capture, teacher, fillers)
    return Imported(corpora, sum(filler.num_written for filler in fillers), cleaned, k or stored)


_SETTINGS = (
    "row_length",
    "max_document_tokens",
    "train_tokens",
    "validation_tokens",
    "validation_fraction",
)
"""The keys of corpus.* that an import reads."""


def _require_free(corpus: Address, logits: Address) -> None:
    """Refuse to replace a corpus or a cache that was made from something else."""
    there = [("paths.corpus", corpus)] if is_there(corpus) else []
    if any(has_cache(logits, split) for split in SPLITS):
        there.append(("paths.logits", logits))
    if there:
        key, address = there[0]
        raise MismatchError(
            f"{address} was made from something else: set {key} to another place, or replace "
            "corpus and cache by --overwrite"
        )


def _fingerprint(
    capture: DistillKitCapture, corpus: CorpusSplit, source_sha256: str, k: int
) -> Fingerprint:
    info = corpus.info
    if k > info.vocab_size:
        raise ParamsError(
            f"the capture keeps {k} ids per position, more than the {info.vocab_size} of the "
            "tokenizer: set paths.teacher to the tokenizer that it was made with, or give --k"
        )
    return Fingerprint(
        format_version=FORMAT_VERSION,
        teacher_sha256=source_sha256,
        tokenizer_sha256=info.tokenizer_sha256,
        corpus_sha256=info.sha256,
        dtype="unknown",
        engine=capture.name,
        document_mask=True,
        k=k,
        num_sampled=0,
        sampling_seed=0,
        temperatures=(),
        top_p=None,
        entropy_quantile=0.0,
        vocab_size=info.vocab_size,
        num_rows=info.num_rows,
        row_length=info.row_length,
        imported_from=capture.name,
    )


class _Filler:
    """The cache of a split, whose shards are written as soon as all their targets have arrived."""

    def __init__(self, params: Params, corpus: CorpusSplit, wanted: Fingerprint) -> None:
        self.corpus = corpus
        self.num_written = 0
        self._fingerprint = wanted
        self._address, self._sizes = params.paths.logits, params.prepare
        where = self._address / corpus.split
        there = _fingerprint_at(self._address, corpus.split)
        if there and (difference := there.difference(wanted)):
            raise MismatchError(
                f"{where} {difference}: set paths.logits to another place, or add --overwrite"
            )
        self._writer = CacheWriter(self._address, corpus.split, wanted) if there else None
        shards = -(-len(corpus) // self._sizes.shard_rows)
        self._missing = self._writer.missing() if self._writer else list(range(shards))
        self._is_wanted = np.zeros(corpus.info.num_documents, np.bool_)
        for shard in self._missing:
            self._is_wanted[list(self._documents_of(shard))] = True
        self._waiting: dict[int, Targets] = {}
        self._next = self._documents_of(self._missing[0]) if self._missing else set()

    @property
    def is_complete(self) -> bool:
        """Whether all shards are written."""
        return not self._missing

    def wants(self, number: int) -> bool:
        """Return whether a document lies in a shard that is missing."""
        return bool(self._is_wanted[number])

    def add(self, number: int, targets: Targets) -> None:
        """Take the targets of a document, and write the shards that are complete with them."""
        self._waiting[number] = targets
        while self._missing and self._next <= self._waiting.keys():
            shard = self._missing.pop(0)
            rows = self.corpus.rows(*self._rows_of(shard))
            topk = self._topk_of(rows)
            self._write(shard, topk, rows)
            for written in self._next:
                del self._waiting[written]
            self._next = self._documents_of(self._missing[0]) if self._missing else set()

    def _write(self, shard: int, topk: TopK, rows: Rows) -> None:
        if self._writer is None:
            create_cache(
                self._address,
                self.corpus.split,
                self._fingerprint,
                chunk_rows=self._sizes.chunk_rows,
                shard_rows=self._sizes.shard_rows,
                id_order=IdOrder.of(topk),
            )
            self._writer = CacheWriter(self._address, self.corpus.split, self._fingerprint)
        self._writer.write(shard, topk, hash_rows(rows))
        self.num_written += 1

    def _rows_of(self, shard: int) -> tuple[int, int]:
        size = self._writer.layout.shard_rows if self._writer else self._sizes.shard_rows
        return shard * size, min((shard + 1) * size, len(self.corpus))

    def _documents_of(self, shard: int) -> set[int]:
        """Return the numbers of the documents in a shard."""
        return set(np.unique(self.corpus.rows(*self._rows_of(shard)).doc_ids).tolist()) - {PADDING}

    def _topk_of(self, rows: Rows) -> TopK:
        shape = (*rows.tokens.shape, self._fingerprint.k)
        ids, logprobs = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
        for row, doc_ids in enumerate(rows.doc_ids):
            for number, place in document_places(doc_ids):
                found = self._waiting[number]
                inside = slice(place.start, place.stop - 1)
                ids[row, inside] = found.ids[:, : shape[-1]]
                logprobs[row, inside] = found.logprobs[:, : shape[-1]]
        unknown, nothing = torch.full(shape[:2], torch.nan), torch.zeros(*shape[:2], 0)
        return TopK(
            has_target=positions_in_loss(rows),
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            lse=unknown,
            lse_tau=nothing,
            entropy=unknown,
            sampled_ids=nothing.long(),
            sampled_counts=nothing.int(),
            sampled_logprobs=nothing,
            num_sampled=0,
            temperatures=(),
            vocab_size=self._fingerprint.vocab_size,
            has_row_sums=False,
        )


def _fingerprint_at(address: Address, split: str) -> Fingerprint | None:
    if not has_cache(address, split):
        return None
    layout = load_layout(open_folder(address / split), str(address / split))
    return layout.fingerprint if layout else None


def _write_targets(
    params: CorpusParams, capture: DistillKitCapture, teacher: Path, fillers: Sequence[_Filler]
) -> Cleaned:
    """Fill the caches from one pass over the source."""
    counts = Cleaned()
    if all(filler.is_complete for filler in fillers):
        return counts
    vocab_size = fillers[0].corpus.info.vocab_size
    choices = [Choice(params, filler.corpus.split, vocab_size, teacher) for filler in fillers]

    def choose(place: str, document: Document) -> tuple[tuple[_Filler, int], int] | None:
        for filler, choice in zip(fillers, choices, strict=True):
            if (found := choice.take(place, document)) is not None:
                number = choice.num_taken - 1
                chosen = (filler, number), len(found) - 1
                return chosen if filler.wants(number) else None
        return None

    total = sum(filler.corpus.info.num_tokens for filler in fillers)
    with progress_bar(what="convert targets", total=total, unit="tok") as bar:
        for (filler, number), targets in capture.targets(choose, vocab_size, counts):
            filler.add(number, targets)
            bar.update(len(targets.ids) + 1)
            if all(filler.is_complete for filler in fillers):
                return counts
    raise DecantError(
        "the capture holds other documents than it did a moment ago: leave its files unchanged, "
        "and run the same command again"
    )
