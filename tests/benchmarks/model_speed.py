"""The student beside transformers' model of the same weights: forward, training, generation.

    python tests/benchmarks/model_speed.py [--rounds 7] [--teacher cache/teacher]

Prints ratios measured in one run, the variants taking turns: their time over ours, so above 1 ours
is faster. Shapes are those of the default student and of SmolLM2-135M, weights random; with
--teacher, generation runs on a folder's real weights too. The head is left out of nothing: both
compute all logits in forward and backward, and both generate with a KV cache, greedily, without an
eos.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pipeline.generation import GenerationSettings, generate_ids
from pipeline.model.student import ModelConfig, StudentModel
from pipeline.model.weights import load_student, save_student

SMOLLM2 = ModelConfig(
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    intermediate_size=1536,
    vocab_size=49_152,
    max_seq_len=8192,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    attention_bias=False,
)
SHAPES = {"the default student, 123 M": ModelConfig(), "SmolLM2-135M": SMOLLM2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def median_ratio(
    theirs: Callable[[], object], ours: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median of their time over ours in each turn, and the medians of both, in seconds."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        pair = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            (theirs, ours)[which]()
            pair[which] = time.perf_counter() - started
        if turn:  # the first warms up
            times.append((pair[0], pair[1]))
    ratio = statistics.median(a / b for a, b in times)
    return ratio, statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


def forwards(theirs: Any, ours: StudentModel, rows: int, length: int, rounds: int) -> None:
    """Forward alone without gradients, and forward, cross-entropy and backward."""
    tokens = torch.randint(0, ours.config.vocab_size, (rows, length))

    def forward(model: Callable[[], torch.Tensor], half: bool) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            model()

    def train(model: Callable[[], torch.Tensor], half: bool, owner: torch.nn.Module) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            logits = model()
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
        owner.zero_grad()

    def their_logits() -> torch.Tensor:
        logits: torch.Tensor = theirs(tokens, use_cache=False).logits
        return logits

    def our_logits() -> torch.Tensor:
        logits: torch.Tensor = ours(tokens)
        return logits

    for name, half in (("float32", False), ("bfloat16 autocast", True)):
        for what, one, two in (
            ("forward", partial(forward, their_logits, half), partial(forward, our_logits, half)),
            (
                "forward + backward",
                partial(train, their_logits, half, theirs),
                partial(train, our_logits, half, ours),
            ),
        ):
            ratio, a, b = median_ratio(one, two, rounds)
            print(f"  {what:20} {name:18} {ratio:5.2f}  ({a:.2f} s, ours {b:.2f} s)", flush=True)


def decoding(theirs: Any, ours: StudentModel, rounds: int, new: int = 32, prompt: int = 64) -> None:
    """Tokens per second of whole generate() calls after prefill, at batch 1 and 8."""
    for name, dtype in DTYPES.items():
        theirs.to(dtype)
        ours.to(dtype)
        for rows in (1, 8):
            tokens = torch.randint(5, ours.config.vocab_size, (rows, prompt))

            def their_run(count: int, tokens: torch.Tensor = tokens) -> None:
                theirs.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=count,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )

            def our_run(count: int, tokens: torch.Tensor = tokens) -> None:
                generate_ids(ours, tokens.tolist(), GenerationSettings(max_new_tokens=count))

            steps = []
            for turn in range(rounds + 1):
                pair = []
                for run in (their_run, our_run) if turn % 2 else (our_run, their_run):
                    prefill, whole = _seconds(run, 1), _seconds(run, 1 + new)
                    pair.append((whole - prefill) / new)
                if turn:
                    steps.append(pair if turn % 2 else pair[::-1])
            ratio = statistics.median(a / b for a, b in steps)
            their_step, our_step = (statistics.median(times) for times in zip(*steps, strict=True))
            print(
                f"  decode, batch {rows}      {name:18} {ratio:5.2f}  "
                f"({rows / their_step:.1f} tokens/s, ours {rows / our_step:.1f})",
                flush=True,
            )


def _seconds(run: Callable[[int], None], count: int) -> float:
    started = time.perf_counter()
    run(count)
    return time.perf_counter() - started


@click.command()
@click.option("--rounds", default=7, help="Timed turns of each pair.")
@click.option("--rows", default=4, help="Rows of a batch, forward and backward.")
@click.option("--length", default=256, help="Tokens of a row, forward and backward.")
@click.option("--teacher", type=click.Path(path_type=Path), help="Generate with this folder too.")
@click.option("--only", type=click.Choice(["forward", "decode"]), help="One half of it.")
def main(rounds: int, rows: int, length: int, teacher: Path | None, only: str | None) -> None:
    """Time ours and theirs by turns."""
    print(f"{torch.get_num_threads()} threads; theirs / ours, medians of {rounds} turns")
    for name, config in SHAPES.items():
        torch.manual_seed(0)
        ours = StudentModel(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_student(ours, Path(folder) / "model", tokenizer_from=None)
            theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
        print(f"{name}, {rows} x {length}")
        if only != "decode":
            forwards(theirs, ours, rows, length, rounds)
        if only != "forward":
            decoding(theirs, ours, rounds)
    if teacher is not None and only != "forward":
        print(f"{teacher}")
        theirs = AutoModelForCausalLM.from_pretrained(teacher).eval()
        decoding(theirs, load_student(teacher).eval(), rounds)


if __name__ == "__main__":
    main()
