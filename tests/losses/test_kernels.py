"""The Triton kernels against their plain twin: interpreted on a CPU, and on a GPU where one is."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from pipeline.config.train_params import Divergence
from pipeline.losses import chunked, kernels_torch
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.losses.kernels_torch import SoftmaxKernels
from pipeline.model.logit_transform import UNCHANGED, LogitTransform
from pipeline.targets.reduce import top_k_from_logits
from tests.triton_checks import interpret_fast, needs_triton, run_apart  # noqa: F401  # for the other process

TAUS = (1.0, 2.0, 0.5)


def check_passes(fused: SoftmaxKernels, device: str) -> None:
    """Kernels against PyTorch's passes, for vocabularies of part of a block, one, and some."""
    for vocabulary in (5, 300, 4096, 9001):
        for tau in TAUS:
            logits = torch.randn(7, vocabulary, device=device) * 5
            logits[0] = -torch.inf  # a student without ids outside T
            logits[1, :3] = -torch.inf
            logits[2] *= 20.0
            weights = torch.randn(2, 7, 1, device=device)
            of_tau, of_one = weights[0], None if tau == 1.0 else weights[1]
            found, expected = [], []
            for over, results in ((fused, found), (kernels_torch, expected)):
                own = logits.clone()
                sums = over.softmax_stats(own, tau)
                over.softmax_grad_(own, sums, tau, of_tau, of_one)
                results += [sums.peak, sums.at_tau, sums.at_one, own]
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def check_losses(fused: SoftmaxKernels, device: str) -> None:
    """The whole loss by either, value and gradient, for every divergence and sampled ids."""
    hidden = torch.randn(9, 8, device=device, requires_grad=True)
    weight = torch.randn(305, 8, device=device, requires_grad=True)
    labels = torch.randint(0, 300, (9,), device=device)
    teacher = torch.randn(9, 300, device=device) * 3
    bucket = top_k_from_logits(teacher, 7, TAUS)
    drawn = top_k_from_logits(teacher, 4, TAUS, torch.rand(9, 6, device=device))
    everything = top_k_from_logits(teacher, 300, TAUS)
    cases: list[tuple[Any, Divergence]] = [(bucket, name) for name in get_args(Divergence)]
    cases += [(None, "forward_kl"), (drawn, "forward_kl"), (everything, "reverse_kl")]
    chosen = chunked.kernels_for
    for topk, divergence in cases:
        for tau, transform in ((1.0, UNCHANGED), (2.0, UNCHANGED), (2.0, LogitTransform(0.5, 4.0))):
            results = []
            for over in (kernels_torch, fused):
                chunked.kernels_for = lambda _, over=over: over
                sums = distillation_loss_sums(
                    hidden,
                    weight,
                    labels,
                    topk,
                    alpha=0.6,
                    temperature=tau,
                    divergence=divergence,
                    transform=transform,
                    chunk=4,
                )
                grads = torch.autograd.grad(sums.total, (hidden, weight))
                results.append([sums.total, sums.ce, sums.divergence, *grads])
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    chunked.kernels_for = chosen


@needs_triton
def test_interpreted_kernels_equal_the_plain_passes() -> None:
    run_apart(
        "tests.losses.test_kernels",
        "from pipeline.losses import kernels_triton; interpret_fast(); torch.manual_seed(0); "
        "check_passes(kernels_triton, 'cpu'); check_losses(kernels_triton, 'cpu')",
        TRITON_INTERPRET="1",
    )


@pytest.mark.gpu
def test_kernels_equal_the_plain_passes_on_a_gpu() -> None:
    from pipeline.losses import kernels_triton

    assert chunked.kernels_for(torch.device("cuda")) is kernels_triton
    check_passes(kernels_triton, "cuda")
    check_losses(kernels_triton, "cuda")


def test_a_cpu_takes_the_plain_passes() -> None:
    assert chunked.kernels_for(torch.device("cpu")) is kernels_torch
