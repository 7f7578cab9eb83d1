"""What a capture by vLLM costs: its processor time over that of a capture by transformers.

    python tests/benchmarks/engine_cost.py --python VLLM/bin/python [--rows 32] [--set KEY=VALUE]

Takes the teacher and corpus of params.yaml, those of `dvc repro` or others by --set. Both engines
take turns on the same shards in one run, on one thread, and write a cache each time. The time is
user and system time of this process and, for vLLM, of all processes of its own; loading the model
is not part of it. Linux only. --python may also be named by DECANT_TEST_VLLM.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from pipeline.capture.capture import fingerprint_of, open_capture
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.runtime.device import pick_device
from pipeline.teacher.engines import open_teacher, teacher_dtype
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.vllm import VllmTeacher


def processor_seconds(teacher: Teacher) -> float:
    """Processor time until now of this process, and of the engine's process group."""
    seconds = time.process_time()
    if isinstance(teacher, VllmTeacher):
        group = str(teacher._engine._process.pid)
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = file.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended since
                continue
            if fields[2] == group:
                seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def capture_seconds(teacher: Teacher, corpus: CorpusSplit, params: Params) -> float:
    """Processor time of the capture of two shards."""
    with tempfile.TemporaryDirectory() as folder:
        paths = params.paths.model_copy(update={"logits": Path(folder)})
        here = params.model_copy(update={"paths": paths})
        fingerprint = fingerprint_of(here, corpus, teacher.dtype)
        capture = open_capture(teacher, corpus, fingerprint, here)
        started = processor_seconds(teacher)
        capture.run([0, 1])
        return processor_seconds(teacher) - started


@click.command()
@click.option("--python", envvar="DECANT_TEST_VLLM", required=True, help="Of vLLM's environment.")
@click.option("--rows", default=32, help="Rows a shard; two shards are captured.")
@click.option("--rounds", default=3)
@click.option("--set", "overrides", multiple=True, help="As the stages take it.")
def main(python: str, rows: int, rounds: int, overrides: tuple[str, ...]) -> None:
    """Print the ratio."""
    torch.set_num_threads(1)
    sizes = [f"prepare.shard_rows={rows}", f"prepare.chunk_rows={min(32, rows)}"]
    params = load_params(Path("params.yaml"), [f"prepare.vllm.python={python}", *sizes, *overrides])
    corpus = CorpusSplit(params.paths.corpus, "train")
    device = pick_device(params.device)
    dtype = teacher_dtype(params, device)
    teachers = {
        name: open_teacher(params, corpus.info.vocab_size, dtype, device, engine=name)
        for name in ("vllm", "transformers")
    }
    of_engine = {
        name: params.model_copy(
            update={"prepare": params.prepare.model_copy(update={"engine": name})}
        )
        for name in teachers
    }
    times: dict[str, list[float]] = {name: [] for name in teachers}
    for turn in range(rounds + 1):
        for name, teacher in teachers.items():
            seconds = capture_seconds(teacher, corpus, of_engine[name])
            if turn:
                times[name].append(seconds)
                print(f"  {name} {seconds:.2f} s")
    ratios = [a / b for a, b in zip(times["vllm"], times["transformers"], strict=True)]
    tokens = 2 * rows * corpus.info.row_length
    print(
        f"processor time of a capture by {teachers['vllm'].describe()}, over transformers': "
        f"{statistics.median(ratios):.2f}, the median of {rounds} rounds of {tokens:,} tokens"
    )


if __name__ == "__main__":
    main()
