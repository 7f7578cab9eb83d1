"""What leaving prompts out saves: time and bytes of capturing chats, all positions against answers.

    python tests/benchmarks/chat_capture.py [--conversations 64] [--rounds 3] [--set KEY=VALUE]

Takes the teacher and prepare.* of params.yaml. The conversations are made up: a user shows a
function of Python's library and asks what it does, and the answer is its docstring. They become two
corpora of the same rows through the teacher's chat template, one with every token in the loss and
one with the answers alone (corpus.loss_on=completions). Both are captured in turns, after one round
of warm-up: the ratios are what counts.
"""

from __future__ import annotations

import ast
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from shutil import rmtree

import click

from pipeline.capture.capture import fingerprint_of, open_capture
from pipeline.config.params import Params, load_params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.logit_cache.reader import CacheReader
from pipeline.runtime.device import pick_device
from pipeline.teacher.engines import open_teacher, teacher_dtype
from pipeline.teacher.teacher import Teacher

WAYS = {"all positions": "all", "answers alone": "completions"}


def conversations() -> Iterator[list[dict[str, str]]]:
    """Functions of Python's library without their docstrings, and the docstrings."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = file.read_text()
        for node in ast.walk(ast.parse(source)):
            if (
                isinstance(node, ast.FunctionDef)
                and len(answer := ast.get_docstring(node) or "") > 99
            ):
                code = ast.unparse(ast.fix_missing_locations(without_docstring(node)))
                yield [
                    {"role": "user", "content": f"What does this function do?\n\n{code[:2000]}"},
                    {"role": "assistant", "content": answer},
                ]


def without_docstring(node: ast.FunctionDef) -> ast.FunctionDef:
    node.body = node.body[1:] or [ast.Pass()]
    return node


def write_corpora(params: Params, folder: Path, number: int) -> dict[str, Params]:
    """Build the corpus of each way; returns the parameters for it."""
    file = folder / "chats.jsonl"
    lines = (json.dumps({"messages": chat}) for chat in islice(conversations(), number))
    file.write_text("\n".join(lines))
    found = {}
    for way, loss_on in WAYS.items():
        corpus = {
            "source": "files",
            "files": {"paths": [str(file)], "column": "messages"},
            "loss_on": loss_on,
            "packing": "best_fit",
            "train_tokens": None,
            "validation_fraction": 0.1,
            "max_document_tokens": None,
        }
        values = params.model_dump(mode="json")
        values["corpus"] |= corpus
        values["paths"]["corpus"] = str(folder / f"{loss_on}.zarr")
        values["paths"]["logits"] = str(folder / f"{loss_on}-logits.zarr")
        found[way] = Params.model_validate(values)
        build_corpus(found[way].corpus, params.paths.teacher, found[way].paths.corpus)
    return found


def capture(teacher: Teacher, params: Params) -> tuple[float, float]:
    """Seconds of a capture of the training split, from nothing: by the clock, of the processor."""
    rmtree(params.paths.logits, ignore_errors=True)
    corpus = CorpusSplit(params.paths.corpus, "train")
    work = open_capture(teacher, corpus, fingerprint_of(params, corpus, teacher.dtype), params)
    started = time.perf_counter(), time.process_time()
    work.run(work.writer.missing())
    return time.perf_counter() - started[0], time.process_time() - started[1]


@click.command()
@click.option("--conversations", "number", default=64, help="Conversations in both splits.")
@click.option("--rounds", default=3, help="Timed turns of each way.")
@click.option("--set", "overrides", multiple=True, help="As the stages take it.")
def main(number: int, rounds: int, overrides: tuple[str, ...]) -> None:
    """Print both ways and their ratios."""
    params = load_params(Path("params.yaml"), list(overrides))
    with tempfile.TemporaryDirectory() as name:
        ways = write_corpora(params, Path(name), number)
        corpora = {way: CorpusSplit(of.paths.corpus, "train") for way, of in ways.items()}
        device = pick_device(params.device)
        vocab_size = next(iter(corpora.values())).info.vocab_size
        teacher = open_teacher(params, vocab_size, teacher_dtype(params, device), device)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, of in ways.items():
                seconds = capture(teacher, of)
                if turn:
                    times[way].append(seconds)
        spent, sizes = [], []
        for way, corpus in corpora.items():
            info = corpus.info
            seconds, busy = (statistics.median(each) for each in zip(*times[way], strict=True))
            size = CacheReader(ways[way].paths.logits, corpus).num_bytes() / info.num_positions
            share = info.num_in_loss / info.num_positions
            print(
                f"{way}: {info.num_positions:,} tokens, {share:.1%} in the loss, {seconds:.1f} s, "
                f"{size:.1f} bytes per token"
            )
            spent.append((seconds, busy))
            sizes.append(size)
    print(
        f"answers alone over all positions: time {spent[1][0] / spent[0][0]:.3f}, "
        f"processor time {spent[1][1] / spent[0][1]:.3f}, "
        f"bytes {sizes[1] / sizes[0]:.3f}"
    )


if __name__ == "__main__":
    main()
