"""What reducing a teacher's logits to TopK costs: PyTorch's passes, and Triton's kernels on a GPU.

    python tests/benchmarks/reduce_speed.py [--case 49k] [--rounds 20]

GB/s count the logits once, which is the least that a reduction can read. The last columns compare
the time with that of the product that makes the logits, float16 factors (float32 on a CPU) of 896
and 3,584 columns, the sizes of teachers of 0.5 B and 7 B parameters. K=64, temperatures 1 and 2, M
sampled ids; the lines with K=0 show what the search for the largest logits takes. The variants take
turns; times on a GPU are medians between CUDA events, random logits, the formats' shapes being

    49k     49,152 ids; 256 and 1,024 rows
    152k    151,665 ids, the ids of Qwen2.5's tokenizer; 256 and 1,024 rows
    tiny    300 ids, 8 rows: to see that the script runs
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import click
import torch
from measure import medians
from torch import Tensor

from pipeline.config.resolved import padded_vocabulary
from pipeline.runtime.device import pick_device
from pipeline.targets import reduce_torch
from pipeline.targets.reduce import Reduction, reduction_for

CASES = {"49k": (49_152, (256, 1024)), "152k": (151_665, (256, 1024)), "tiny": (300, (8,))}
HIDDEN_SIZES = (896, 3584)
TEMPERATURES = (1.0, 2.0)
K = 64

Variants = dict[str, Callable[[], object]]


def median_seconds(variants: Variants, rounds: int, device: torch.device) -> dict[str, float]:
    """The median of each variant, the variants taking turns after two rounds of warm-up."""
    if device.type == "cpu":
        return medians(variants, rounds)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, call in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) / 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def product(rows: int, hidden: int, vocabulary: int, device: torch.device) -> Callable[[], object]:
    """The product of states and head, with float32 results, in whole tiles as a teacher's is."""
    vocabulary = padded_vocabulary(vocabulary)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    states = torch.randn(rows, hidden, device=device, dtype=dtype)
    head = torch.randn(vocabulary, hidden, device=device, dtype=dtype)
    if device.type == "cuda":
        return lambda: torch.mm(states, head.T, out_dtype=torch.float32)
    return lambda: torch.mm(states, head.T)


def reduction(passes: Reduction, logits: Tensor, k: int, num_sampled: int) -> Callable[[], object]:
    uniforms = torch.rand(len(logits), num_sampled, device=logits.device)
    return lambda: passes.reduce_rows(logits, k, TEMPERATURES, uniforms, None)


def compare(vocabulary: int, rows: int, rounds: int, device: torch.device) -> None:
    """One table."""
    logits = torch.randn(rows, padded_vocabulary(vocabulary), device=device) * 4
    logits = logits[:, :vocabulary]
    chosen = reduction_for(device)
    named = {"PyTorch": reduce_torch} | ({} if chosen is reduce_torch else {"Triton": chosen})
    variants: Variants = {}
    for name, passes in named.items():
        for k, num_sampled in ((0, 0), (K, 0), (K, 16)):
            key = f"{name}, K={k}, M={num_sampled}"
            variants[key] = reduction(passes, logits, k, num_sampled)
    for hidden in HIDDEN_SIZES:
        variants[f"product of {hidden}"] = product(rows, hidden, vocabulary, device)
    seconds = median_seconds(variants, rounds, device)
    print(f"{rows} rows x {vocabulary:,} ids")
    for name in variants:
        took = seconds[name]
        shares = ", ".join(
            f"{took / seconds[f'product of {hidden}']:5.2f} of the product of {hidden}"
            for hidden in HIDDEN_SIZES
        )
        rate = logits.numel() * 4 / took / 1e9
        print(f"  {name:22} {took * 1e6:9.0f} us  {rate:7.0f} GB/s  {shares}")


@click.command()
@click.option("--case", type=click.Choice(list(CASES)), multiple=True, default=["49k", "152k"])
@click.option("--rounds", default=20, help="Timed turns of each variant.")
@click.option("--device", "name", default="auto", help="As the key `device` of params.yaml.")
def main(case: tuple[str, ...], rounds: int, name: str) -> None:
    """Print the tables."""
    device = pick_device(name)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}")
    for key in case:
        vocabulary, all_rows = CASES[key]
        for rows in all_rows:
            compare(vocabulary, rows, rounds, device)


if __name__ == "__main__":
    main()
