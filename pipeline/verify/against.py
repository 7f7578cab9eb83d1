"""What a change of the teacher costs, for example quantisation, beside what the cache's cut costs.

Teacher and another model run over the same rows, and their distributions over the whole vocabulary
are compared at each position in the loss, a few positions at a time. The divergence is
KL(other || teacher): the nats per token that are lost by taking the teacher for the other model,
which is usually the one that it was quantised from.

The cut is measured on the teacher's own distribution p, with T the K kept ids and p_t the mass
outside them: p_t itself; the entropy within the tail, p_t H(p | tail), which no student can learn
from the cache (`nats_lost`); and KL(p renormalised over T || p) = -log(1 - p_t), the error of
targets without the tail.

Shapes: n positions, V valid vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, Rows, row_labels
from pipeline.data.vocabulary import require_shared_ids, require_tokenizer
from pipeline.errors import DecantError, ParamsError
from pipeline.model.attention_mask import documents_apart
from pipeline.model.folder import teacher_folder
from pipeline.runtime.batch_sizes import compared_at_once, gpu_memory
from pipeline.runtime.bootstrap import Interval, clusters_of, intervals
from pipeline.runtime.console import announce, progress
from pipeline.runtime.device import pick_device, seconds_of
from pipeline.runtime.position_values import PositionValues
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.topk import nats_lost
from pipeline.teacher.engines import open_teacher, teacher_dtype
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.verify.power import spread


@dataclass(frozen=True, kw_only=True)
class CutCost:
    """Means over positions of what the teacher's kept ids leave out."""

    k: int
    top_p: float | None
    tail_mass: float
    nats_lost: float  # entropy within the tail
    renormalised_kl: float  # KL(renormalised top K || teacher)


@dataclass(frozen=True, kw_only=True)
class AgainstReport:
    """The comparison of the teacher with another model; divergences in nats per token."""

    teacher: str  # described, as the next
    against: str
    batches: int
    rows: int
    tokens: int  # in the loss
    kl: float  # KL(against || teacher)
    max_kl: float
    top1: float  # share of positions with the same most probable id
    cosine: float  # of the probabilities
    teacher_loss: float  # cross-entropy of the next token
    against_loss: float
    cut: CutCost | None  # None for prepare.k=0
    interval: dict[str, Interval]  # of `kl`, `top1` and `loss_difference`, teacher minus against
    resampled: str  # what intervals are resampled from, for example "29 documents"

    def lines(self) -> Iterator[str]:
        """Yield the lines for the terminal."""
        kl, top1 = self._spread("kl", 6), self._spread("top1", 4)
        yield f"{'KL(against || teacher)':24} {self.kl:.6f}{kl} nats per token"
        yield f"{'top-1 agreement':24} {self.top1:.4f}{top1}, mean cosine {self.cosine:.6f}"
        difference = self.teacher_loss - self.against_loss
        yield (
            f"{'cross-entropy':24} teacher {self.teacher_loss:.4f}, against "
            f"{self.against_loss:.4f}, difference {difference:+.4f}"
            f"{self._spread('loss_difference', 4)}"
        )
        if self.cut is not None:
            mass = "" if self.cut.top_p is None else f", cut at {self.cut.top_p:g},"
            name = f"top {self.cut.k}{mass} of the teacher"
            yield (
                f"{name:24} leaves out {self.cut.tail_mass:.2%} of the mass and "
                f"{self.cut.nats_lost:.4f} nats; renormalised, its KL is "
                f"{self.cut.renormalised_kl:.4f} nats"
            )
        if self.interval:
            yield f"±: half of a 95 % interval, by resampling {self.resampled}"

    def _spread(self, name: str, digits: int) -> str:
        found = self.interval.get(name)
        return "" if found is None else f" ± {found.half_width:.{digits}f}"


def compare_with(folder: Path, params: Params) -> AgainstReport:
    """Compare the teacher of paths.teacher, as prepare opens it, with the model of a folder.

    Both are in memory. The rows are verify.batches x verify.batch_rows of the validation split.

    Raises:
        DecantError: the folder holds no model, or one with other ids, or it cannot run.
    """
    if not (folder / "config.json").exists():
        raise ParamsError(f"--against {folder} holds no config.json: name a model folder")
    corpus = CorpusSplit(params.paths.corpus, "validation")
    ours = teacher_folder(params.paths.teacher)
    require_tokenizer(ours, corpus)
    require_shared_ids(folder, [corpus], ours)
    device = pick_device(params.device)
    dtype = teacher_dtype(params, device)
    vocab_size = corpus.info.vocab_size
    head_chunk = compared_at_once(vocab_size, gpu_memory(device))
    teacher = open_teacher(params, vocab_size, dtype, device, head_chunk=head_chunk)
    against = HuggingFaceTeacher(
        folder,
        vocab_size=vocab_size,
        dtype=dtype,
        device=device,
        head_chunk=head_chunk,
        what="model to compare with",
    )
    return compare(teacher, against, corpus, params)


@torch.no_grad()
def compare(
    teacher: Teacher, against: Teacher, corpus: CorpusSplit, params: Params
) -> AgainstReport:
    """Compare two models on rows of a split, with logits in chunks of the same positions."""
    size = params.verify.batch_rows
    numbers = spread([len(corpus)], params.verify.batches * size, params.seed)
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    _announce(teacher, against, corpus, params, batches)
    found = PositionValues(len(numbers) * corpus.info.row_length, teacher.device)
    documents: list[NDArray[np.int32]] = []
    row_numbers: list[NDArray[np.int64]] = []
    for batch in progress(batches, what="verify", unit="batch"):
        rows = _read(corpus, batch)
        labels = row_labels(rows)
        wanted = (labels != IGNORE).numpy()
        if not wanted.any():
            continue
        _compare(teacher, against, rows, labels, params, found)
        documents.append(rows.doc_ids[wanted])
        row_numbers.append(np.asarray(batch)[wanted.nonzero()[0]])
    values = found.by_name()
    if not values:
        raise DecantError(
            f"none of {len(numbers):,} validation rows has a position in the loss, so there is "
            "nothing to compare: raise verify.batches"
        )
    if not bool(torch.isfinite(values["kl"]).all()):
        raise DecantError(
            "the logits of the teacher or of the model of --against overflow, or a probability is "
            "0: set prepare.dtype to bfloat16 or float32"
        )
    clusters, resampled = clusters_of(documents, row_numbers)
    resample = {
        "kl": values["kl"],
        "top1": values["top1"],
        "loss_difference": values["teacher_loss"] - values["against_loss"],
    }
    interval = intervals({name: value.numpy() for name, value in resample.items()}, clusters)
    means = {name: float(value.double().mean()) for name, value in values.items()}
    cut = None
    if params.prepare.k:
        cut = CutCost(
            k=params.prepare.k,
            top_p=params.prepare.top_p,
            tail_mass=means["tail_mass"],
            nats_lost=means["nats_lost"],
            renormalised_kl=means["renormalised_kl"],
        )
    return AgainstReport(
        teacher=teacher.describe(),
        against=against.describe(),
        batches=len(batches),
        rows=len(numbers),
        tokens=len(values["kl"]),
        kl=means["kl"],
        max_kl=float(values["kl"].max()),
        top1=means["top1"],
        cosine=means["cosine"],
        teacher_loss=means["teacher_loss"],
        against_loss=means["against_loss"],
        cut=cut,
        interval=interval,
        resampled=resampled,
    )


def _announce(
    teacher: Teacher,
    against: Teacher,
    corpus: CorpusSplit,
    params: Params,
    batches: list[list[int]],
) -> None:
    row = _read(corpus, batches[0][:1])
    labels = row_labels(row)

    def one_row() -> None:
        unused = PositionValues(labels.numel(), teacher.device)
        _compare(teacher, against, row, labels, params, unused)

    a_row = seconds_of(one_row, teacher.device)
    announce(
        "verify",
        f"compares {teacher.describe()} with {against.describe()} on {len(batches)} batches",
        a_row * sum(map(len, batches)),
    )


def _read(corpus: CorpusSplit, numbers: list[int]) -> Rows:
    return Rows.cat([corpus.rows(number, number + 1) for number in numbers])


def _compare(
    teacher: Teacher,
    against: Teacher,
    rows: Rows,
    labels: Tensor,
    params: Params,
    found: PositionValues,
) -> None:
    """Add the values at the positions with a label."""
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    apart = documents_apart(doc_ids, params.prepare.document_mask)
    wanted = (labels != IGNORE).flatten().nonzero()[:, 0]
    both = (model.logits_by_chunk(tokens, apart, wanted) for model in (teacher, against))
    for (place, ours), (_, theirs) in zip(*both, strict=True):
        values = _values(
            ours,
            theirs.to(ours.device),
            labels.flatten()[wanted[place]],
            min(params.prepare.k, teacher.vocab_size),
            params.prepare.top_p,
        )
        found.add(values)


def _values(
    ours: Tensor, theirs: Tensor, labels: Tensor, k: int, top_p: float | None
) -> dict[str, Tensor]:
    """Compare the teacher's logits, float32 [n, V], with another model's at the same positions."""
    log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    label = labels.to(ours.device)[:, None]
    values = {
        # Negative only by rounding.
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp_min(0.0),
        "top1": (ours.max(-1).indices == theirs.max(-1).indices).float(),
        "cosine": F.cosine_similarity(q, p, dim=-1),
        "teacher_loss": -log_q.gather(-1, label)[:, 0],
        "against_loss": -log_p.gather(-1, label)[:, 0],
    }
    if k:
        topk = top_k_from_logits(ours, k, (), top_p=top_p)
        _, tail_mass = topk.target(1.0)
        values |= {
            "tail_mass": tail_mass,
            "nats_lost": nats_lost(topk).float(),
            "renormalised_kl": -torch.log1p(-tail_mass),
        }
    return values
