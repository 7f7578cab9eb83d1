"""A training step from the cache against one with a live teacher: time and peak memory.

    python tests/benchmarks/online_step.py [--rounds 5] [--busy] [--case 49k]

The student is 16 of SmolLM2-135M's layers (85 M parameters), a step is 1,024 tokens with forward,
backward, clipping and AdamW; random weights. Teachers: one of the student's own shape, and
SmolLM2-360M's, 4.3 times as large. Dense: the teacher's forward, full rows of logits of both sides,
KL over the whole vocabulary by autograd, which is what most tools do. Top 64: the live teacher's
logits reduced at once to what a cache would hold, then the same loss as from the cache. Ratios are
of one run, variants taking turns; memory is each variant's peak in a process of its own, beyond
what was held before the student, the teacher and the targets were made. `--case tiny` has small
shapes, to see that the script runs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import click
import torch
from head_and_loss import CASES, LENGTH, TINY, K
from measure import DEVICE, forget_peak, in_child, made_up_targets, medians, peak_mib, processor
from torch import Tensor

from pipeline.losses.chunked import distillation_loss_sums
from pipeline.losses.reference import cross_entropy, full_kl
from pipeline.model.decoder import StudentModel
from pipeline.runtime.batch_sizes import gpu_memory, resolve_head_chunk
from pipeline.runtime.numerics import matmul_float32
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.topk import TopK

TOKENS, ALPHA = 1024, 0.5
STUDENT = CASES["49k"][1]
LARGER = replace(
    STUDENT, hidden_size=960, num_layers=32, num_heads=15, num_kv_heads=5, intermediate_size=2560
)
SHAPES = {  # of each case: the student, and the larger teacher
    "49k": (STUDENT, LARGER),
    "tiny": (TINY, replace(TINY, num_layers=4)),
}
TEACHERS = ("of equal size", "of 4.3x the size")
VARIANTS = {
    "CE alone": ("none", 0),
    "cached, top 64": ("cached", 0),
    **{f"online, top 64, teacher {name}": ("top", n) for n, name in enumerate(TEACHERS)},
    **{f"online, dense, teacher {name}": ("dense", n) for n, name in enumerate(TEACHERS)},
}


class Step:
    """The student, its batch, and the teachers as they are needed."""

    def __init__(self, case: str) -> None:
        self.shapes = SHAPES[case]
        self.student = StudentModel(self.shapes[0]).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)
        vocabulary = self.shapes[0].vocab_size
        self.tokens = torch.randint(vocabulary, (TOKENS // LENGTH, LENGTH), device=DEVICE)
        self.labels = torch.randint(vocabulary, (TOKENS,), device=DEVICE)
        self.cached = made_up_targets(TOKENS, vocabulary, K)
        self.teachers: dict[int, StudentModel] = {}

    def take(self, variant: str) -> None:
        """One optimizer step."""
        kind, number = VARIANTS[variant]
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            hidden = self.student.hidden_states(self.tokens).flatten(0, 1)
        if kind == "dense":
            loss = self.dense(hidden, self.teacher(number))
        else:
            topk = self.top(self.teacher(number)) if kind == "top" else self.cached
            loss = self.sparse(hidden, None if kind == "none" else topk)
        (loss / TOKENS).backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def teacher(self, number: int) -> StudentModel:
        if number not in self.teachers:
            model = StudentModel(self.shapes[number]).to(DEVICE, torch.bfloat16)
            self.teachers[number] = model.requires_grad_(False)
        return self.teachers[number]

    def sparse(self, hidden: Tensor, topk: TopK | None) -> Tensor:
        return distillation_loss_sums(
            hidden,
            self.student.head_weight,
            self.labels,
            topk,
            alpha=ALPHA,
            temperature=1.0,
            dtype=torch.bfloat16,
            chunk=resolve_head_chunk(
                "auto", len(self.student.head_weight), gpu_memory(hidden.device)
            ),
        ).total

    def dense(self, hidden: Tensor, teacher: StudentModel) -> Tensor:
        with torch.no_grad():
            wanted = teacher(self.tokens).flatten(0, 1).float()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            logits = (hidden @ self.student.head_weight.T).float()
        kl, ce = full_kl(wanted, logits, 1.0), cross_entropy(logits, self.labels)
        return (ALPHA * kl + (1.0 - ALPHA) * ce).sum()

    @torch.no_grad()
    def top(self, teacher: StudentModel) -> TopK:
        rows = teacher.hidden_states(self.tokens).flatten(0, 1).split(256)
        head = teacher.head_weight.float()
        logits = (matmul_float32(h.float(), head.T, torch.bfloat16) for h in rows)
        return TopK.cat([top_k_from_logits(z, K, (1.0,)) for z in logits])


def peak_of(variant: str, case: str) -> float:
    """MiB that two steps take, student, optimizer and teacher included."""
    before = forget_peak()
    step = Step(case)
    for _ in range(2):
        step.take(variant)
    return peak_mib() - before


@click.command()
@click.option("--rounds", default=5, help="Timed steps of each variant.")
@click.option("--busy", is_flag=True, help="Processor's seconds of one thread, not the clock's.")
@click.option("--case", type=click.Choice(list(SHAPES)), default="49k", help="tiny: to try it.")
def main(rounds: int, busy: bool, case: str) -> None:
    """Print the table."""
    torch.manual_seed(0)
    step = Step(case)
    seconds = medians({name: partial(step.take, name) for name in VARIANTS}, rounds, busy=busy)
    peaks = {name: in_child(peak_of, name, case) for name in VARIANTS}
    cached = "cached, top 64"
    print(f"{TOKENS} tokens per step, times and memory of the cached step, {processor()}")
    for name in VARIANTS:
        print(
            f"  {name:40} time {seconds[name] / seconds[cached]:5.2f} "
            f"({1e3 * seconds[name]:.1f} ms), "
            f"memory {peaks[name] / peaks[cached]:5.2f} ({peaks[name]:.0f} MiB)",
            flush=True,
        )


if __name__ == "__main__":
    main()
