"""What distilling from a cache costs beside cross-entropy alone: head and loss, and whole steps.

    python tests/benchmarks/head_and_loss.py [--case 49k] [--rounds 7] [--busy]

Time: ratios measured in one run, the variants taking turns, since absolute times on a shared
machine mean little. Memory: each variant in a process of its own, its peak beyond what was held
once model and batch were there, targets counted in. Everything on random weights and made-up
targets; a step is forward, backward, clipping and AdamW of

    49k     16 of SmolLM2-135M's layers (the demo's student), 2,048 tokens, 49,152 ids
    152k    the default student, 123 M parameters, 1,024 tokens, 151,936 ids
    tiny    2 layers of size 32, 256 tokens, 304 ids: to see that the script runs
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import click
import torch
from head_memory import LIGER, Loss
from measure import DEVICE, forget_peak, in_child, made_up_targets, medians, peak_mib, processor
from torch import Tensor

from pipeline.losses.chunked import distillation_loss_sums
from pipeline.losses.reference import distillation_loss
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.runtime.batch_sizes import gpu_memory, resolve_head_chunk
from pipeline.targets.block_search import block_top_k
from pipeline.targets.topk import TopK

K, LENGTH = 64, 256
TINY = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    vocab_size=304,
)
CASES = {
    "49k": (
        2048,
        ModelConfig(
            hidden_size=576,
            num_layers=16,
            num_heads=9,
            num_kv_heads=3,
            intermediate_size=1536,
            vocab_size=49_152,
            rope_theta=1e5,
            attention_bias=False,
        ),
    ),
    "152k": (1024, ModelConfig()),
    "tiny": (256, TINY),
}
VARIANTS = {
    "CE": (False, 1.0),
    "KL + CE at tau 1": (True, 1.0),
    "KL + CE at tau 2": (True, 2.0),
}


def sums_of(hidden: Tensor, weight: Tensor, labels: Tensor, topk: TopK, variant: str) -> Tensor:
    """The objective of a variant by the chunked head."""
    distilled, temperature = VARIANTS[variant]
    return distillation_loss_sums(
        hidden,
        weight,
        labels,
        topk if distilled else None,
        alpha=0.5,
        temperature=temperature,
        dtype=torch.bfloat16,
        chunk=resolve_head_chunk("auto", len(weight), gpu_memory(weight.device)),
    ).total


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, topk: TopK) -> Tensor:
    """KL + CE at temperature 1 by autograd on full rows of logits."""
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        logits = hidden @ weight.T
    return distillation_loss(logits.float(), labels, topk, alpha=0.5, temperature=1.0).sum()


def liger() -> dict[str, Loss]:
    """Liger-Kernel's losses, which need it and a GPU; the second has a live teacher."""
    usable = DEVICE == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return LIGER if usable else {}


class Step:
    """A student and its optimizer, to be trained by any variant."""

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        self.student = StudentModel(config).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)
        self.tokens = torch.randint(config.vocab_size, (tokens // LENGTH, LENGTH), device=DEVICE)
        self.labels = torch.randint(config.vocab_size, (tokens,), device=DEVICE)

    def take(self, topk: TopK, variant: str) -> None:
        """One optimizer step."""
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            hidden = self.student.hidden_states(self.tokens).flatten(0, 1)
        loss = sums_of(hidden, self.student.head_weight, self.labels, topk, variant)
        (loss / len(self.labels)).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def head_inputs(config: ModelConfig, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, config.hidden_size, device=DEVICE, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, device=DEVICE) * 0.12
    return (
        hidden,
        weight.requires_grad_(),
        torch.randint(config.vocab_size, (tokens,), device=DEVICE),
    )


def peak_of(what: str, case: str, variant: str) -> float:
    """MiB that two turns take beyond what is held before them."""
    tokens, config = CASES[case]
    step = Step(config, tokens) if what == "step" else None
    inputs = head_inputs(config, tokens)
    before = forget_peak()
    topk = made_up_targets(tokens, config.vocab_size, K) if VARIANTS[variant][0] else None
    for _ in range(2):
        if step is not None:
            step.take(topk, variant)
        else:
            torch.autograd.grad(sums_of(*inputs, topk, variant), inputs[:2])
    return peak_mib() - before


def show(title: str, values: dict[str, float], scale: float, unit: str) -> None:
    print(title)
    for name, value in values.items():
        print(f"  {name:38} {value / values['CE']:6.3f} x CE ({value * scale:.0f} {unit})")


def compare(case: str, rounds: int, busy: bool) -> None:
    """All tables of one case."""
    tokens, config = CASES[case]
    torch.manual_seed(0)
    topk = made_up_targets(tokens, config.vocab_size, K)
    inputs = head_inputs(config, tokens)
    shape = f"{tokens} tokens x {config.vocab_size} ids, K={K}, bfloat16 factors, {processor()}"

    def head(variant: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(sums_of(*inputs, topk, variant), inputs[:2])

    timed: dict[str, Callable[[], object]] = {variant: head(variant) for variant in VARIANTS}
    others: dict[str, Loss] = {"the same, tau 1, plain": plain} | liger()
    for name, loss in others.items():
        timed[name] = lambda loss=loss: torch.autograd.grad(loss(*inputs, topk), inputs[:2])
    show(f"head and loss: {shape}", medians(timed, rounds, busy=busy), 1e6 / tokens, "us per token")
    step = Step(config, tokens)
    timed = {variant: lambda v=variant: step.take(topk, v) for variant in VARIANTS}
    show("whole training step", medians(timed, rounds, busy=busy), 1e6 / tokens, "us per token")
    for what in ("head", "step"):
        peaks = {name: in_child(peak_of, what, case, name) for name in VARIANTS}
        show(f"peak memory, {what}", peaks, 1.0, "MiB")


@click.command()
@click.option("--case", type=click.Choice(list(CASES)), multiple=True, default=["49k", "152k"])
@click.option("--rounds", default=7, help="Timed turns of each variant.")
@click.option("--busy", is_flag=True, help="Processor's seconds of one thread, not the clock's.")
def main(case: tuple[str, ...], rounds: int, busy: bool) -> None:
    """Print the tables."""
    for name in case:
        compare(name, rounds, busy)
    logits = torch.randn(64, 49_152, device=DEVICE)
    seconds = medians(
        {"torch.topk": lambda: logits.topk(K), "block_top_k": lambda: block_top_k(logits, K)},
        rounds * 4,
        busy=busy,
    )
    ratio = seconds["block_top_k"] / seconds["torch.topk"]
    print(f"block_top_k takes {ratio:.2f} of torch.topk's time")


if __name__ == "__main__":
    main()
