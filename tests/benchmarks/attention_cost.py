"""What keeping documents apart costs and changes: prepare.document_mask=true against false.

    python tests/benchmarks/attention_cost.py [--rows 64] [--rounds 5] [--set KEY=VALUE]

Takes teacher, student and corpus of params.yaml, those of `dvc repro` or others by --set. Both ways
take turns on the same rows in one run: the ratio is what counts. On a CPU it is of processor time,
in which other programs matter less, best under OMP_NUM_THREADS=1. Then the teacher's loss on the
validation rows both ways: how much of its prediction leans on the documents packed before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, row_labels
from pipeline.model.attention_mask import documents_apart
from pipeline.runtime.batch_sizes import gpu_memory, resolve_batch_rows, resolve_head_chunk
from pipeline.runtime.device import pick_device, training_dtype
from pipeline.target_sources.tokens_only import TokensOnly
from pipeline.teacher.engines import open_teacher, teacher_dtype
from pipeline.teacher.teacher import Teacher
from pipeline.training.batches import make_batch
from pipeline.training.distillation import DistillationLoss
from pipeline.training.students import build_student

WAYS = {"row": False, "documents": True}
"""Attention over the whole row, and within its documents: values of prepare.document_mask."""


def ratio_of(call: Callable[[str], None], rounds: int) -> tuple[float, float]:
    """Median over rounds of the seconds with the document mask over those without, and of these."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    ratios, plain = [], []
    for turn in range(rounds + 1):
        spent = {}
        for way in WAYS if turn % 2 else reversed(WAYS):
            started = clock()
            call(way)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[way] = clock() - started
        if turn:
            ratios.append(spent["documents"] / spent["row"])
            plain.append(spent["row"])
    return statistics.median(ratios), statistics.median(plain)


def capture(teacher: Teacher, corpus: CorpusSplit, params: Params, rows: int, way: str) -> None:
    """Teacher, head and reduction to the top K."""
    wanted = params.prepare
    batch_rows = resolve_batch_rows(
        params.capture.batch_rows, corpus.info.row_length, teacher.device.type
    )
    for first in range(0, rows, batch_rows):
        batch = corpus.rows(first, min(first + batch_rows, rows))
        apart = documents_apart(torch.from_numpy(batch.doc_ids), WAYS[way])
        tokens = torch.from_numpy(batch.tokens)
        teacher.top_k(tokens, wanted.k, wanted.temperatures, doc_ids=apart)


def teacher_loss(teacher: Teacher, corpus: CorpusSplit, way: str) -> float:
    """Mean cross-entropy of a split, nats per token."""
    total, count = 0.0, 0
    for first in range(0, len(corpus), 16):
        rows = corpus.rows(first, min(first + 16, len(corpus)))
        tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
        labels = row_labels(rows).flatten().to(teacher.device)
        for place, logits in teacher.logits_by_chunk(tokens, documents_apart(doc_ids, WAYS[way])):
            wanted = labels[place] != IGNORE
            log_p = logits[wanted].log_softmax(-1)
            total -= float(log_p.gather(-1, labels[place][wanted][:, None]).sum())
            count += int(wanted.sum())
    return total / count


@click.command()
@click.option("--rows", default=64, help="Rows captured a turn.")
@click.option("--rounds", default=5)
@click.option("--set", "overrides", multiple=True, help="As the stages take it.")
def main(rows: int, rounds: int, overrides: tuple[str, ...]) -> None:
    """Print ratios and losses."""
    params = load_params(Path("params.yaml"), overrides)
    corpus = CorpusSplit(params.paths.corpus, "train")
    device = pick_device(params.device)
    teacher = open_teacher(
        params,
        corpus.info.vocab_size,
        teacher_dtype(params, device),
        device,
    )
    rows = min(rows, len(corpus))
    several = sum(len(set(ids.tolist())) > 1 for ids in corpus.rows(0, rows).doc_ids)
    print(f"{several} of the first {rows} rows hold several documents")
    ratio, seconds = ratio_of(lambda way: capture(teacher, corpus, params, rows, way), rounds)
    print(f"capture: documents {ratio:.3f} x row ({seconds:.1f} s)")
    student = build_student(params.student, params.paths.teacher).to(device)
    distillation = DistillationLoss(
        student,
        dtype=training_dtype(params.train.dtype, device),
        head_chunk=resolve_head_chunk(
            params.run.head_chunk, student.vocab_size, gpu_memory(device)
        ),
    )

    def step(way: str) -> None:
        source = TokensOnly(corpus, shard_rows=rows, document_mask=WAYS[way])
        shard = source.shard(0)
        places = [(shard, row) for row in range(min(rows, params.train.batch_rows))]
        batch = make_batch(source, places)
        total, _, _ = distillation(batch, alpha=0.0, temperature=1.0, divergence="forward_kl")
        total.backward()
        student.zero_grad(set_to_none=True)

    ratio, seconds = ratio_of(step, rounds)
    print(f"training step: documents {ratio:.3f} x row ({seconds:.1f} s)")
    held_out = CorpusSplit(params.paths.corpus, "validation")
    losses = {way: teacher_loss(teacher, held_out, way) for way in WAYS}
    print("teacher's validation loss: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))


if __name__ == "__main__":
    main()
