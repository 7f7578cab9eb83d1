"""What capture costs on top of the teacher: bare forward (body and head) over capture, end to end.

    python tests/benchmarks/capture_cost.py [--rows 32] [--shards 2] [--set KEY=VALUE]

Takes the teacher and corpus of params.yaml, those of `dvc repro` or others by --set. Both variants
take turns on the same rows in one run: the ratio is what counts. With --peak TFLOPS also the share
of the machine's peak FLOP/s in the teacher's format.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from pipeline.capture.capture import fingerprint_of, open_capture
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import positions_in_loss
from pipeline.model.attention_mask import documents_apart
from pipeline.runtime.batch_sizes import resolve_batch_rows
from pipeline.runtime.device import pick_device
from pipeline.teacher.engines import open_teacher, teacher_dtype
from pipeline.teacher.teacher import Teacher


def bare(teacher: Teacher, corpus: CorpusSplit, rows: range, params: Params) -> None:
    """Hidden states, and logits at the positions in the loss, chunk by chunk, thrown away."""
    batch_rows = resolve_batch_rows(
        params.capture.batch_rows, corpus.info.row_length, teacher.device.type
    )
    for first in range(rows.start, rows.stop, batch_rows):
        batch = corpus.rows(first, min(first + batch_rows, rows.stop))
        tokens, doc_ids = torch.from_numpy(batch.tokens), torch.from_numpy(batch.doc_ids)
        positions = positions_in_loss(batch).flatten().nonzero()[:, 0]
        apart = documents_apart(doc_ids, params.prepare.document_mask)
        for _ in teacher.logits_by_chunk(tokens, apart, positions):
            pass
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    teacher: Teacher, corpus: CorpusSplit, params: Params, shards: list[int], rounds: int
) -> tuple[float, float]:
    """Median ratio of bare forward to capture over the same shards; median seconds of capture."""
    times: dict[str, list[float]] = {"bare": [], "capture": []}
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            paths = params.paths.model_copy(update={"logits": Path(folder)})
            here = params.model_copy(update={"paths": paths})
            capture = open_capture(
                teacher, corpus, fingerprint_of(here, corpus, teacher.dtype), here
            )
            rows = range(capture.writer.layout.rows_of(shards[-1])[1])
            started = time.perf_counter()
            bare(teacher, corpus, rows, params)
            middle = time.perf_counter()
            capture.run(shards)
            ended = time.perf_counter()
        if turn:
            times["bare"].append(middle - started)
            times["capture"].append(ended - middle)
            print(
                f"  bare {middle - started:.1f} s, capture {ended - middle:.1f} s, "
                f"{(middle - started) / (ended - middle):.3f}"
            )
    ratios = sorted(a / b for a, b in zip(times["bare"], times["capture"], strict=True))
    return statistics.median(ratios), statistics.median(times["capture"])


@click.command()
@click.option("--rows", default=32, help="Rows per shard.")
@click.option("--shards", default=2, help="Shards that are captured.")
@click.option("--rounds", default=8)
@click.option("--set", "overrides", multiple=True, help="As the stages take it.")
@click.option("--peak", default=0.0, help="Peak TFLOP/s of the machine in the teacher's format.")
def main(rows: int, shards: int, rounds: int, overrides: tuple[str, ...], peak: float) -> None:
    """Print the ratio."""
    sizes = [f"prepare.shard_rows={rows}", f"prepare.chunk_rows={min(32, rows)}"]
    params = load_params(Path("params.yaml"), [*sizes, *overrides])
    corpus = CorpusSplit(params.paths.corpus, "train")
    device = pick_device(params.device)
    teacher = open_teacher(
        params,
        corpus.info.vocab_size,
        teacher_dtype(params, device),
        device,
    )
    ratio, capture_seconds = measure(teacher, corpus, params, list(range(shards)), rounds)
    tokens = shards * rows * corpus.info.row_length
    print(f"capture runs at {ratio:.3f} of the bare forward's speed, the median of {rounds} rounds")
    print(f"{tokens / capture_seconds:.0f} tokens/s captured, K={params.prepare.k}")
    if peak:
        config = json.loads((params.paths.teacher / "config.json").read_text())
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        body = sum(p.numel() for p in teacher.model.base_model.layers.parameters())
        attention = 2 * layers * width * corpus.info.row_length  # scores and values, causal half
        flops = 2 * (body + corpus.info.vocab_size * width) + attention
        print(f"{flops * tokens / capture_seconds / 1e12 / peak:.1%} of the peak FLOP/s")


if __name__ == "__main__":
    main()
