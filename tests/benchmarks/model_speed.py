"""The student beside transformers' model of the same weights: forward, training, generation.

    python tests/benchmarks/model_speed.py [--rounds 7] [--teacher cache/teacher] [--shape tiny]
    OMP_NUM_THREADS=1 python tests/benchmarks/model_speed.py --cpu-time     # beside other work

Prints ratios measured in one run, the variants taking turns: their time over ours, so above 1 ours
is faster. Shapes are those of the default student and of SmolLM2-135M, weights random; with
--teacher, generation runs on a folder's real weights too. Both
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
from measure import DEVICE, finish, processor
from transformers import AutoModelForCausalLM

from pipeline.generation.decode import DecodeStep, product
from pipeline.generation.sampling import GenerationSettings, generate_ids
from pipeline.model.decoder import ModelConfig, StudentModel
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
TINY = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    vocab_size=304,
)
SHAPES = {"default": ModelConfig(), "smollm2": SMOLLM2, "tiny": TINY}
NAMES = {
    "default": "the default student, 123 M",
    "smollm2": "SmolLM2-135M",
    "tiny": "2 layers of size 32, to see that the script runs",
}
clock = time.perf_counter
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ratio_by_turns(
    theirs: Callable[[], float], ours: Callable[[], float], rounds: int
) -> tuple[float, float, float]:
    """Median over turns of their seconds over ours, and the medians of both.

    Each call returns the seconds that count. Who goes first changes; the first turn warms up.
    """
    pairs = []
    for turn in range(rounds + 1):
        pairs.append((theirs(), ours()) if turn % 2 else (ours(), theirs())[::-1])
    ratio = statistics.median(a / b for a, b in pairs[1:])
    their_median, our_median = (statistics.median(side) for side in zip(*pairs[1:], strict=True))
    return ratio, their_median, our_median


def seconds(call: Callable[[], object]) -> float:
    """Time of a call, of the clock that `main` chose."""
    finish()
    started = clock()
    call()
    finish()
    return clock() - started


def products(rounds: int, inner: int, outer: int) -> None:
    """The products of pipeline/generation/decode.py: x W^T by its own choice, W from memory."""
    for name, dtype in DTYPES.items():
        for rows in (1, 8, 32):
            x = torch.randn(rows, inner).to(dtype)
            weights = [torch.randn(outer, inner).to(dtype) for _ in range(64)]
            given = x[0] if rows == 1 else x

            @torch.inference_mode()
            def plain(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                for weight in weights:
                    F.linear(x, weight)

            @torch.inference_mode()
            def chosen(x: torch.Tensor = given, weights: list[torch.Tensor] = weights) -> None:
                for weight in weights:
                    product(x, weight)

            ratio, _, _ = ratio_by_turns(partial(seconds, plain), partial(seconds, chosen), rounds)
            print(f"  product, {rows:2} rows     {name:18} {ratio:5.2f}", flush=True)


def forwards(theirs: Any, ours: StudentModel, rows: int, length: int, rounds: int) -> None:
    """Forward alone without gradients, and forward, cross-entropy and backward."""
    tokens = torch.randint(0, ours.config.vocab_size, (rows, length), device=DEVICE)
    their_logits = lambda: theirs(tokens, use_cache=False).logits  # noqa: E731
    our_logits = lambda: ours(tokens)  # noqa: E731

    @torch.no_grad()
    def forward(logits: Callable[[], Any], half: bool) -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
            logits()

    def train(logits: Callable[[], Any], half: bool) -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
            found = logits()
        F.cross_entropy(found.flatten(0, 1).float(), tokens.flatten()).backward()
        theirs.zero_grad()
        ours.zero_grad()

    for name, half in (("float32", False), ("bfloat16 autocast", True)):
        for what, step in (("forward", forward), ("forward + backward", train)):
            ratio, a, b = ratio_by_turns(
                partial(seconds, partial(step, their_logits, half)),
                partial(seconds, partial(step, our_logits, half)),
                rounds,
            )
            print(
                f"  {what:20} {name:18} {ratio:5.2f}  ({1e3 * a:.1f} ms, ours {1e3 * b:.1f} ms)",
                flush=True,
            )


@torch.inference_mode()
def one_decoder(ours: StudentModel, rounds: int, prompt: int = 64) -> None:
    """A token by the decoder's ordinary forward with its cache, over one by `DecodeStep`."""
    for rows in (1, 8):
        tokens = torch.randint(5, ours.config.vocab_size, (rows, prompt), device=DEVICE)
        plain, own = (ours.new_cache(rows, prompt + rounds + 1) for _ in range(2))
        for cache in (plain, own):
            ours.hidden_states(tokens, cache=cache)
        new = tokens[:, :1]
        ordinary = partial(ours, new, cache=plain)
        step = partial(DecodeStep(ours, own), new[:, 0])
        ratio, a, b = ratio_by_turns(partial(seconds, ordinary), partial(seconds, step), rounds)
        print(
            f"  ordinary, batch {rows}    float32            {ratio:5.2f}  "
            f"({1e3 * a:.1f} ms, ours {1e3 * b:.1f} ms)",
            flush=True,
        )


def decoding(theirs: Any, ours: StudentModel, rounds: int, new: int = 32, prompt: int = 64) -> None:
    """Seconds a token behind the first, of whole generate() calls, at batch 1 and 8."""
    for name, dtype in DTYPES.items():
        theirs.to(dtype)
        ours.to(dtype)
        for rows in (1, 8):
            tokens = torch.randint(5, ours.config.vocab_size, (rows, prompt), device=DEVICE)

            def their_run(count: int, tokens: torch.Tensor) -> None:
                theirs.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=count,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )

            def our_run(count: int, tokens: torch.Tensor) -> None:
                generate_ids(ours, tokens.tolist(), GenerationSettings(max_new_tokens=count))

            def a_token(run: Callable[..., None], tokens: torch.Tensor) -> float:
                first = seconds(partial(run, 1, tokens))
                return (seconds(partial(run, 1 + new, tokens)) - first) / new

            ratio, a, b = ratio_by_turns(
                partial(a_token, their_run, tokens), partial(a_token, our_run, tokens), rounds
            )
            print(
                f"  decode, batch {rows}      {name:18} {ratio:5.2f}  "
                f"({rows / a:.1f} tokens/s, ours {rows / b:.1f})",
                flush=True,
            )


@click.command()
@click.option("--rounds", default=7, help="Timed turns of each pair.")
@click.option("--rows", default=4, help="Rows of a batch, forward and backward.")
@click.option("--length", default=256, help="Tokens of a row, forward and backward.")
@click.option("--teacher", type=click.Path(path_type=Path), help="Generate with this folder too.")
@click.option(
    "--shape", type=click.Choice(list(SHAPES)), multiple=True, default=["default", "smollm2"]
)
@click.option("--only", type=click.Choice(["forward", "decode"]), help="One half of it.")
@click.option("--cpu-time", is_flag=True, help="Count the processor's time, not the wall's.")
def main(
    rounds: int,
    rows: int,
    length: int,
    teacher: Path | None,
    shape: tuple[str, ...],
    only: str | None,
    cpu_time: bool,
) -> None:
    """Time ours and theirs by turns."""
    global clock
    clock = time.process_time if cpu_time else time.perf_counter
    print(f"{processor()}; theirs / ours, medians of {rounds} turns")
    if only != "forward" and DEVICE == "cpu":
        largest = SHAPES[shape[-1]]
        products(rounds, largest.hidden_size, largest.intermediate_size)
    for name in shape:
        config = SHAPES[name]
        torch.manual_seed(0)
        ours = StudentModel(config).to(DEVICE).eval()
        with tempfile.TemporaryDirectory() as folder:
            save_student(ours, Path(folder) / "model", tokenizer_from=None)
            theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
            theirs = theirs.to(DEVICE).eval()
        print(f"{NAMES[name]}, {rows} x {length}")
        if only != "decode":
            forwards(theirs, ours, rows, length, rounds)
        if only != "forward":
            one_decoder(ours, rounds)
            decoding(theirs, ours, rounds)
    if teacher is not None and only != "forward":
        print(f"{teacher}")
        theirs = AutoModelForCausalLM.from_pretrained(teacher).to(DEVICE).eval()
        decoding(theirs, load_student(teacher).to(DEVICE).eval(), rounds)


if __name__ == "__main__":
    main()
