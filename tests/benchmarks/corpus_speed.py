"""The speed of tokenizing a corpus: one process against several, texts and chats.

    python tests/benchmarks/corpus_speed.py [--megabytes 40] [--rounds 3] [--workers 2]

Builds whole corpora from the source files of Python's standard library, as texts of 4,000
characters and as chats of two turns, with the tokenizer of paths.teacher (after `dvc repro`). The
variants take turns. Beside the seconds that passed it prints the processors' seconds: on a machine
with other work, only those are telling. What N free cores need at least is the greater of the first
process's seconds and an Nth of all.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import click

from pipeline.config.params import load_params
from pipeline.config.source_params import CorpusParams
from pipeline.data.corpus import build_corpus
from pipeline.data.sources import stdlib_files
from pipeline.model.folder import teacher_folder
from pipeline.model.tokenizer import load_tokenizer

CHARACTERS = 4000


def pieces(megabytes: float) -> Iterator[str]:
    """Distinct texts, until there are as many characters as wanted."""
    files = [file.read_text(encoding="utf-8", errors="replace") for file in stdlib_files()]
    left = megabytes * 1e6
    for turn in count():
        for text in files:
            for start in range(0, len(text), CHARACTERS):
                if left <= 0:
                    return
                piece = f"# {turn}\n{text[start : start + CHARACTERS]}"
                left -= len(piece)
                yield piece


def as_chat(text: str) -> list[dict[str, str]]:
    middle = len(text) // 2
    turns = (("user", text[:middle]), ("assistant", text[middle:]))
    return [{"role": role, "content": content} for role, content in turns]


def spent() -> tuple[float, float, float]:
    """Seconds that have passed, and those of this process and of its children on processors."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    here, children = (one.ru_utime + one.ru_stime for one in usage)
    return time.perf_counter(), here, children


def measure(values: dict[str, Any], teacher: Path, where: Path, workers: int) -> list[float]:
    before = spent()
    infos = build_corpus(CorpusParams(**values), teacher, where, workers=workers)
    tokens = sum(info.num_tokens for info in infos.values())
    return [*(after - start for after, start in zip(spent(), before, strict=True)), tokens]


@click.command()
@click.option("--megabytes", default=40.0, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--workers", default=2, show_default=True)
def main(megabytes: float, rounds: int, workers: int) -> None:
    teacher = teacher_folder(load_params(Path("params.yaml")).paths.teacher)
    has_template = bool(load_tokenizer(teacher).chat_template)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("texts", "chats") if has_template else ("texts",):
            file = Path(folder, f"{kind}.jsonl")
            with file.open("w", encoding="utf-8") as stream:
                for text in pieces(megabytes):
                    content = text if kind == "texts" else as_chat(text)
                    stream.write(json.dumps({"it": content}) + "\n")
            values: dict[str, Any] = {
                "source": "files",
                "files": {"paths": [str(file)], "column": "it"},
                "train_tokens": None,
                "validation_tokens": 10**12,
                "max_document_tokens": None,
            }
            if kind == "chats":
                values |= {"loss_on": "completions", "packing": "best_fit"}
            times: dict[int, list[list[float]]] = {1: [], workers: []}
            for _ in range(rounds):
                for number, found in times.items():
                    found.append(measure(values, teacher, Path(folder, "corpus"), number))
            report(kind, times, workers)


def report(kind: str, times: dict[int, list[list[float]]], workers: int) -> None:
    """Print medians, and ratios between variants of the same round."""
    for number, found in times.items():
        wall, here, children, tokens = (
            statistics.median(values) for values in zip(*found, strict=True)
        )
        print(
            f"{kind}, {number} workers: {tokens / wall:,.0f} tokens/s in {wall:.1f} s; processors: "
            f"{here:.1f} s of the first process, {children:.1f} s of the others"
        )
    pairs = list(zip(times[1], times[workers], strict=True))
    speedups = [one[0] / several[0] for one, several in pairs]
    free = [
        (one[1] + one[2]) / max(several[1], (several[1] + several[2]) / workers)
        for one, several in pairs
    ]
    print(
        f"{kind}: {workers} workers are {statistics.median(speedups):.2f} times as fast as one "
        f"({min(speedups):.2f} to {max(speedups):.2f}), with {workers} free cores "
        f"{statistics.median(free):.2f} times"
    )


if __name__ == "__main__":
    main()
