"""Peak memory of head and loss, with gradients: 8,192 tokens, 151,936 ids, D = 896 (Qwen2.5-0.5B).

    python tests/benchmarks/head_memory.py [--tokens 8192] [--vocabulary 151936] [--size 896]

On a GPU where there is one, else on the CPU; each variant in a process of its own, bfloat16
factors. Printed is the peak beyond inputs (hidden states, the head, and the targets, which are
small), and how many chunks of 256 x V float32 logits that is; the head's own gradient, which
nobody can do without, is 3.5 of them, full rows of logits 32. Variants that hold full rows are run
at fewer tokens where the memory at hand does not allow them all, and extrapolated linearly from two
sizes.

DistillKit's formulas are written down here as its `sparse_kl_div` has them (missing mass as zero:
the teacher renormalised, the student not; missing mass as uniform: a tail bucket by
log(1 - sum q)), on the full rows of logits that it takes. Liger-Kernel (`pip install liger-kernel`)
runs on GPUs alone, and its distilling losses take a live teacher's hidden states.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F
from measure import (
    DEVICE,
    available_mib,
    forget_peak,
    in_child,
    made_up_targets,
    peak_mib,
    processor,
)
from torch import Tensor

from pipeline.losses.chunked import distillation_loss_sums
from pipeline.targets.topk import TopK

K = 64
FULL_ROWS = 7.0  # float32 copies of tokens x ids that a variant holds at most
Loss = Callable[[Tensor, Tensor, Tensor, TopK], Tensor]


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, topk: TopK | None) -> Tensor:
    return distillation_loss_sums(
        hidden, weight, labels, topk, alpha=0.5, temperature=1.0, dtype=torch.bfloat16
    ).total


def full_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return hidden @ weight.T


def full_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, _: TopK) -> Tensor:
    return F.cross_entropy(full_logits(hidden, weight).float(), labels, reduction="sum")


def distillkit(hidden: Tensor, weight: Tensor, labels: Tensor, topk: TopK, bucket: bool) -> Tensor:
    """KL / 2 + CE / 2."""
    logits = full_logits(hidden, weight).float()
    log_q = logits.gather(-1, topk.ids) - logits.logsumexp(-1, keepdim=True)
    log_p = topk.logprobs if bucket else topk.logprobs.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    if bucket:
        missing = [(1.0 - x.logsumexp(-1).clamp_max(-1e-6).exp()).log() for x in (log_p, log_q)]
        kl = kl + missing[0].exp() * (missing[0] - missing[1])
    return kl.sum() / 2.0 + F.cross_entropy(logits, labels, reduction="sum") / 2.0


def liger_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, _: TopK) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return loss(weight, hidden, labels)


def liger_jensen_shannon(hidden: Tensor, weight: Tensor, labels: Tensor, _: TopK) -> Tensor:
    """Against a live teacher of the student's shape, whose hidden states count as inputs."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return loss(hidden, weight, hidden.detach(), weight.detach(), labels)


CHUNKED: dict[str, Loss] = {
    "ours: CE": lambda *inputs: chunked(*inputs[:3], None),
    "ours: KL + CE": chunked,
}
FULL: dict[str, Loss] = {
    "F.cross_entropy on full logits": full_cross_entropy,
    "DistillKit's KL, missing zero, + CE": lambda *inputs: distillkit(*inputs, bucket=False),
    "DistillKit's KL, missing uniform, + CE": lambda *inputs: distillkit(*inputs, bucket=True),
}
LIGER: dict[str, Loss] = {
    "Liger: fused linear CE": liger_cross_entropy,
    "Liger: fused linear JSD, live teacher": liger_jensen_shannon,
}
ALL = CHUNKED | FULL | LIGER


def peak_of(variant: str, tokens: int, vocabulary: int, size: int) -> float:
    """MiB beyond the inputs."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size, device=DEVICE, requires_grad=True)
    weight = (torch.randn(vocabulary, size, device=DEVICE) * 0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)
    topk = made_up_targets(tokens, vocabulary, K)
    before = forget_peak()
    ALL[variant](hidden, weight, labels, topk).backward()
    return peak_mib() - before


@click.command()
@click.option("--tokens", default=8192, help="Positions.")
@click.option("--vocabulary", default=151_936, help="Ids.")
@click.option("--size", default=896, help="Of a hidden state.")
def main(tokens: int, vocabulary: int, size: int) -> None:
    """Print the table."""
    print(f"head and loss, {tokens} tokens x {vocabulary} ids, D={size}, on {processor()}")

    def peak(name: str, count: int = tokens) -> float:
        return in_child(peak_of, name, count, vocabulary, size)

    def show(name: str, mib: float, note: str = "") -> None:
        chunks = mib / (256 * vocabulary * 4 / 2**20)
        print(f"  {name:40} {mib:8.0f} MiB, {chunks:6.1f} chunks{note}", flush=True)

    for name in CHUNKED:
        show(name, peak(name))
    fits = FULL_ROWS * tokens * vocabulary * 4 / 2**20 < available_mib()
    for name in FULL:
        if fits:
            show(name, peak(name))
            continue
        few, more = 1024, 2048
        one, two = peak(name, few), peak(name, more)
        slope = (two - one) / (more - few)
        note = f", from {one:.0f} at {few} and {two:.0f} at {more} tokens"
        show(name, one + slope * (tokens - few), note)
    if DEVICE == "cpu":
        print("  Liger-Kernel's fused linear losses: skipped, they need a GPU")
    elif importlib.util.find_spec("liger_kernel") is None:
        print("  Liger-Kernel's fused linear losses: skipped, liger-kernel is not installed")
    else:
        for name in LIGER:
            show(name, peak(name))


if __name__ == "__main__":
    main()
