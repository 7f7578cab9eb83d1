"""What a sparse target costs on disk, and how far its gradient points from the full KL's.

    python tests/benchmarks/targets.py      (after `dvc repro`)

For each kind of target: lossless bytes per token, corpus tokens included; the mean angle, by
position, between the gradient of its loss and of the full KL with respect to the student's logits;
and the angle between the two gradients of the head's weight, summed over a batch of positions,
which is what training follows: errors of single positions that point anywhere cancel in it, a bias
does not. Then the cosine of sorted top-K logits between unrelated positions, which is why the gate
scatters by id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from pipeline.capture.capture import fingerprint_of
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows
from pipeline.io.zarr_shards import ArraySpec, encode_shard
from pipeline.logit_cache.codec import IdOrder, encode
from pipeline.logit_cache.layout import CacheLayout
from pipeline.losses.divergences import renormalised_kl
from pipeline.losses.reference import bucketed, full_kl, sampled_kl, tail_bucket_kl
from pipeline.model.attention_mask import documents_apart
from pipeline.model.decoder import StudentModel
from pipeline.model.weights import load_student
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.topk import TopK
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.students import build_student

Inputs = tuple[Tensor, Tensor | None]  # tokens, and documents to be kept apart
Loss = Callable[[Tensor, TopK, float], Tensor]

BATCH = 512  # positions whose gradients are compared
TAUS = (1.0, 2.0)  # those stored, too: a third would cost 3.7 bytes more


def renormalised(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """KL once both sides are cut to the kept ids and renormalised: what many tools minimise."""
    return renormalised_kl(*bucketed(logits, topk, temperature))


MODES: dict[str, tuple[int, int, Loss]] = {
    "top 64, renormalised": (64, 0, renormalised),
    "top 64, tail bucket": (64, 0, tail_bucket_kl),
    "top 32, tail bucket": (32, 0, tail_bucket_kl),
    "top 16, tail bucket": (16, 0, tail_bucket_kl),
    "top 32 + 16 sampled ids": (32, 16, sampled_kl),
    "top 16 + 16 sampled ids": (16, 16, sampled_kl),
    "50 sampled ids": (0, 50, sampled_kl),
}


def degrees(one: Tensor, two: Tensor) -> float:
    """Mean angle between rows."""
    cosine = torch.nn.functional.cosine_similarity(one, two).clamp(-1, 1)
    return float(cosine.arccos().rad2deg().mean())


def bytes_a_token(topk: TopK, rows: Rows, params: Params, corpus: CorpusSplit) -> float:
    """Bytes of the encoded shard and of the corpus's arrays."""
    made_from = replace(
        fingerprint_of(params, corpus, torch.float32), k=topk.k, num_sampled=topk.num_sampled
    )
    ids = np.concatenate([topk.ids.numpy().ravel(), topk.sampled_ids.numpy().ravel()])
    id_order = IdOrder.by_frequency(
        ids[: 8 * rows.tokens.shape[1] * (topk.k + topk.num_sampled)], topk.vocab_size
    )
    count = len(rows)
    layout = CacheLayout(
        fingerprint=replace(made_from, num_rows=count, temperatures=topk.temperatures),
        chunk_rows=min(count, params.prepare.chunk_rows),
        shard_rows=count,
        id_order="",
    )
    arrays = encode(topk, id_order)
    total = sum(len(encode_shard(spec, arrays[name])) for name, spec in layout.specs.items())
    for name, dtype in (("tokens", "uint16"), ("doc_ids", "int32"), ("in_loss", "uint8")):
        spec = ArraySpec(
            name=name, shape=rows.tokens.shape, dtype=dtype, chunk_rows=count, shard_rows=count
        )
        total += len(encode_shard(spec, getattr(rows, name)))
    return total / rows.tokens.size


def gradients(
    student: StudentModel,
    rows: Inputs,
    loss: Callable[[Tensor], Tensor],
    places: Tensor,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss: of the logits [n, V], of the head's weight [1, V * D].

    V counts the tokenizer's ids; a model may have more rows, which belong to none.
    """
    with torch.no_grad():
        hidden = student.hidden_states(*rows).flatten(0, 1)[places]
        logits = hidden @ student.head_weight[:vocab_size].T
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits).sum(), logits)
    return grad, (grad.T @ hidden).flatten()[None]


@click.command()
def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    params = load_params(Path("params.yaml"))
    corpus = CorpusSplit(params.paths.corpus, "train")
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=corpus.info.vocab_size,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    count = params.prepare.chunk_rows
    rows = corpus.rows(0, count)
    doc_ids = documents_apart(torch.from_numpy(rows.doc_ids), params.prepare.document_mask)
    inputs = torch.from_numpy(rows.tokens), doc_ids
    length = corpus.info.row_length
    chances = {
        num_sampled: row_uniforms(range(count), length, num_sampled, 0).flatten(0, 1)
        for _, num_sampled, _ in MODES.values()
    }
    places = torch.randperm(count * length)[:BATCH].sort().values
    parts: dict[tuple[int, int], list[TopK]] = {mode[:2]: [] for mode in MODES.values()}
    compared = []
    for place, logits in teacher.logits_by_chunk(*inputs):
        chosen = places[(places >= place.start) & (places < place.stop)] - place.start
        compared.append(logits[chosen].clone())
        for (k, num_sampled), found in parts.items():
            found.append(top_k_from_logits(logits.clone(), k, TAUS, chances[num_sampled][place]))
    teacher_logits = torch.cat(compared)
    whole = {mode: TopK.cat(found) for mode, found in parts.items()}
    trained = params.paths.runs / "student" / "model"
    students = {"start": build_student(params.student, params.paths.teacher)}
    if trained.exists():
        students["end"] = load_student(trained)
    print("target                  bytes per token | degrees from the full gradient")
    print(
        "                                      | "
        + " | ".join(
            f"{name} of training, tau {tau:g}: position, batch" for name in students for tau in TAUS
        )
    )
    compared_at = partial(gradients, rows=inputs, places=places, vocab_size=corpus.info.vocab_size)
    full = {
        (name, tau): compared_at(student, loss=lambda z, tau=tau: full_kl(teacher_logits, z, tau))
        for name, student in students.items()
        for tau in TAUS
    }
    for mode, (k, num_sampled, loss) in MODES.items():
        topk = whole[k, num_sampled]
        size = bytes_a_token(
            topk.map(lambda t: t.view(count, length, *t.shape[1:])), rows, params, corpus
        )
        cells = []
        for name, student in students.items():
            for tau in TAUS:
                ours = compared_at(student, loss=partial(loss, topk=topk[places], temperature=tau))
                angles = [degrees(a, b) for a, b in zip(ours, full[name, tau], strict=True)]
                cells.append(" ".join(f"{angle:6.1f}" for angle in angles))
        print(f"{mode:24} {size:12.1f} | " + " | ".join(cells))
    values = teacher_logits.topk(64).values
    cosine = torch.nn.functional.cosine_similarity(values, values[torch.randperm(len(values))])
    print(f"cosine of sorted top-K logits between unrelated positions: {float(cosine.mean()):.4f}")


if __name__ == "__main__":
    main()
