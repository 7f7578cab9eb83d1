"""Head, loss and gradient: chunked against plain, distilled against cross-entropy alone.

    python tests/benchmarks/head_and_loss.py [--vocabulary 49152] [--tokens 2048]

Prints ratios measured in one run, the variants taking turns, since absolute times on a shared
machine mean little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch

from pipeline.losses.chunked import distillation_loss_sums
from pipeline.losses.reference import distillation_loss
from pipeline.topk import TopK, block_top_k, top_k_from_logits

SIZE, K = 576, 64


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


@click.command()
@click.option("--vocabulary", default=49_152, help="Rows of the head.")
@click.option("--tokens", default=2048, help="Positions in a batch.")
@click.option("--rounds", default=5, help="Timed turns of each variant.")
def main(vocabulary: int, tokens: int, rounds: int) -> None:
    """Time the head and the loss."""
    torch.manual_seed(0)
    teacher_head = torch.randn(SIZE, vocabulary) * 0.12
    rows = torch.randn(tokens, SIZE).split(256)
    topk = TopK.cat([top_k_from_logits(h @ teacher_head, K, (1.0, 2.0)) for h in rows])
    hidden = torch.randn(tokens, SIZE, requires_grad=True)
    weight = (torch.randn(vocabulary, SIZE) * 0.12).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))

    def chunked(targets: TopK | None, temperature: float) -> None:
        sums = distillation_loss_sums(
            hidden,
            weight,
            labels,
            targets,
            alpha=0.5,
            temperature=temperature,
            dtype=torch.bfloat16,
        )
        torch.autograd.grad(sums.total, (hidden, weight))

    def plain() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = hidden @ weight.T
        loss = distillation_loss(logits.float(), labels, topk, alpha=0.5, temperature=1.0)
        torch.autograd.grad(loss.sum(), (hidden, weight))

    seconds = medians(
        {
            "CE, chunked": lambda: chunked(None, 1.0),
            "KL + CE at tau 1, chunked": lambda: chunked(topk, 1.0),
            "KL + CE at tau 2, chunked": lambda: chunked(topk, 2.0),
            "KL + CE at tau 1, plain": plain,
        },
        rounds,
    )
    reference = seconds["CE, chunked"]
    print(f"head and loss, {tokens} tokens x {vocabulary} ids, K={K}, bfloat16 factors")
    for name, value in seconds.items():
        print(f"  {name:28} {value / reference:6.3f} x CE ({value / tokens * 1e6:.0f} us a token)")

    logits = torch.randn(64, vocabulary)
    seconds = medians(
        {"torch.topk": lambda: logits.topk(K), "block_top_k": lambda: block_top_k(logits, K)},
        rounds * 4,
    )
    ratio = seconds["block_top_k"] / seconds["torch.topk"]
    print(f"  block_top_k takes {ratio:.2f} of torch.topk's time")


if __name__ == "__main__":
    main()
