"""What a sparse target costs on disk, and how far its gradient points from the full KL's.

    python tests/benchmarks/targets.py      (after `dvc repro`)

For each kind of target: bytes per token in the cache, corpus tokens included, with temperature 1
alone and with temperature 2 beside it; the mean angle, by
position, between the gradient of its loss and of the full KL with respect to the student's logits;
and the angle between the two gradients of the head's weight, summed over a batch of positions,
which is what training follows: errors of single positions that point anywhere cancel in it, a bias
does not. Then the cosine of sorted top-K logits between unrelated positions, which is why the gate
scatters by id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from pipeline.capture.capture import COUNTED_ROWS, fingerprint_of
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows, positions_in_loss
from pipeline.io.zarr_shards import ArraySpec, encode_shard
from pipeline.logit_cache.codec import IdOrder, encode
from pipeline.logit_cache.layout import CacheLayout
from pipeline.losses.divergences import renormalised_kl
from pipeline.losses.reference import bucketed, full_kl, sampled_kl, tail_bucket_kl
from pipeline.model.attention_mask import documents_apart
from pipeline.model.decoder import StudentModel
from pipeline.model.weights import load_student
from pipeline.planning.cache_size import Mode
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.topk import TopK
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.students import build_student

Inputs = tuple[Tensor, Tensor | None]  # tokens, and documents to be kept apart
Loss = Callable[[Tensor, TopK, float], Tensor]

BATCH = 512  # positions whose gradients are compared
TAUS = (1.0, 2.0)  # those stored, too: a third would cost 2 bytes more


def renormalised(logits: Tensor, topk: TopK, temperature: float) -> Tensor:
    """KL once both sides are cut to the kept ids and renormalised: what many tools minimise."""
    return renormalised_kl(*bucketed(logits, topk, temperature))


MODES: dict[str, tuple[Mode, Loss]] = {
    "top 64, renormalised": (Mode(k=64), renormalised),
    "top 64, tail bucket": (Mode(k=64), tail_bucket_kl),
    "top 64, top_p=0.95": (Mode(k=64, top_p=0.95), tail_bucket_kl),
    "top 32, tail bucket": (Mode(k=32), tail_bucket_kl),
    "top 16, tail bucket": (Mode(k=16), tail_bucket_kl),
    "top 32 + 16 sampled ids": (Mode(k=32, num_sampled=16), sampled_kl),
    "top 16 + 16 sampled ids": (Mode(k=16, num_sampled=16), sampled_kl),
    "50 sampled ids": (Mode(k=0, num_sampled=50), sampled_kl),
    "25 sampled ids": (Mode(k=0, num_sampled=25), sampled_kl),
}


def degrees(one: Tensor, two: Tensor) -> float:
    """Mean angle between rows."""
    cosine = torch.nn.functional.cosine_similarity(one, two).clamp(-1, 1)
    return float(cosine.arccos().rad2deg().mean())


def bytes_a_token(topk: TopK, mode: Mode, rows: Rows, params: Params, corpus: CorpusSplit) -> float:
    """Bytes of the encoded shard [B, L, ...] and of the corpus's arrays."""
    count = len(rows)
    made_from = replace(
        fingerprint_of(params, corpus, torch.float32),
        **asdict(mode),
        num_rows=count,
        temperatures=topk.temperatures,
    )
    layout = CacheLayout(
        fingerprint=made_from,
        chunk_rows=min(count, params.prepare.chunk_rows),
        shard_rows=count,
        id_order="",
    )
    arrays = encode(topk, IdOrder.of(topk[:COUNTED_ROWS]), made_from, layout.chunk_rows)
    total = sum(len(encode_shard(spec, arrays[name])) for name, spec in layout.specs.items())
    for name, dtype in (("tokens", "uint16"), ("doc_ids", "int32"), ("in_loss", "uint8")):
        spec = ArraySpec(
            name=name, shape=rows.tokens.shape, dtype=dtype, chunk_rows=count, shard_rows=count
        )
        total += len(encode_shard(spec, getattr(rows, name)))
    return total / rows.tokens.size


def at_one_alone(topk: TopK) -> TopK:
    """The same without what other temperatures need."""
    return replace(
        topk,
        temperatures=(),
        lse_tau=topk.lse_tau[..., :0],
        sampled_logprobs=topk.sampled_logprobs[..., :0],
    )


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
@click.option("--set", "overrides", multiple=True, help="As the stages take it.")
def main(overrides: tuple[str, ...]) -> None:
    """Print the table."""
    torch.manual_seed(0)
    params = load_params(Path("params.yaml"), list(overrides))
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
    tokens = torch.from_numpy(rows.tokens)
    inputs = tokens, doc_ids
    positions = positions_in_loss(rows).flatten().nonzero()[:, 0]
    modes = [mode for mode, _ in MODES.values()]
    chances = {
        mode: row_uniforms(range(count), corpus.info.row_length, mode.num_sampled, 0).flatten(0, 1)[
            positions
        ]
        for mode in modes
    }
    places = torch.randperm(len(positions))[:BATCH].sort().values
    parts: dict[Mode, list[TopK]] = {mode: [] for mode in modes}
    compared = []
    for place, logits in teacher.logits_by_chunk(*inputs, positions):
        chosen = places[(places >= place.start) & (places < place.stop)] - place.start
        compared.append(logits[chosen].clone())
        for mode, found in parts.items():
            found.append(top_k_from_logits(logits, mode.k, TAUS, chances[mode][place], mode.top_p))
    teacher_logits = torch.cat(compared)
    whole = {mode: TopK.cat(found) for mode, found in parts.items()}
    trained = params.paths.runs / "student" / "model"
    students = {"start": build_student(params.student, params.paths.teacher)}
    if trained.exists():
        students["end"] = load_student(trained)
    print("target                  bytes per token, with tau 2 | degrees from the full gradient")
    print(
        "                                                    | "
        + " | ".join(
            f"{name} of training, tau {tau:g}: position, batch" for name in students for tau in TAUS
        )
    )
    compared_at = partial(
        gradients, rows=inputs, places=positions[places], vocab_size=corpus.info.vocab_size
    )
    full = {
        (name, tau): compared_at(student, loss=lambda z, tau=tau: full_kl(teacher_logits, z, tau))
        for name, student in students.items()
        for tau in TAUS
    }
    for name, (mode, loss) in MODES.items():
        topk = whole[mode]
        spread = topk.spread(positions, tokens.shape)
        sizes = [
            bytes_a_token(stored, mode, rows, params, corpus)
            for stored in (at_one_alone(spread), spread)
        ]
        cells = []
        for at, student in students.items():
            for tau in TAUS:
                ours = compared_at(student, loss=partial(loss, topk=topk[places], temperature=tau))
                angles = [degrees(a, b) for a, b in zip(ours, full[at, tau], strict=True)]
                cells.append(" ".join(f"{angle:6.1f}" for angle in angles))
        print(f"{name:24} {sizes[0]:12.1f} {sizes[1]:13.1f} | " + " | ".join(cells))
    values = teacher_logits.topk(64).values
    cosine = torch.nn.functional.cosine_similarity(values, values[torch.randperm(len(values))])
    print(f"cosine of sorted top-K logits between unrelated positions: {float(cosine.mean()):.4f}")


if __name__ == "__main__":
    main()
