"""The public loss: that of training, from logits and from hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.data.packing import IGNORE
from pipeline.errors import MismatchError, ParamsError
from pipeline.integrations.cache_dataset import Row, ShardSampler, collate, model_inputs, topk_of
from pipeline.integrations.kd_loss import sparse_kd_loss
from pipeline.losses.reference import distillation_loss
from pipeline.model.logit_transform import LogitTransform
from pipeline.model.weights import open_student
from pipeline.target_sources.cached import CachedTargets
from pipeline.training.batches import first_rows
from pipeline.training.distillation import DistillationLoss
from tests.helpers import capture_all, change, open_cache
from tests.integrations.test_cache_dataset import MODES, dataset_of


def a_batch(params: Params, rows: int = 4) -> Row:
    dataset = dataset_of(params)
    return collate([dataset[number] for number in range(rows)])


def transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    """The transform by its definition, not in place."""
    logits = transform.scale * logits
    cap = transform.soft_cap
    return logits if cap is None else cap * (logits / cap).tanh()


@pytest.mark.parametrize(
    ("mode", "temperature"),
    [(mode, tau) for mode in MODES for tau in (1.0, 2.0) if (mode, tau) != ("draws", 2.0)],
)
def test_the_loss_is_that_of_the_definition(
    mode: str, temperature: float, tiny_corpus: Params
) -> None:
    """Value and gradient, in float64 by autograd; from hidden states too, with a soft cap."""
    params = change(tiny_corpus, prepare=MODES[mode])
    capture_all(params)
    batch = a_batch(params)
    hidden = torch.randn(4, 32, 8)
    head = torch.randn(310, 8)
    for transform in (LogitTransform(), LogitTransform(scale=0.5, soft_cap=3.0)):
        leaves = [leaf.double().requires_grad_() for leaf in (hidden, head)]
        logits = transformed(leaves[0] @ leaves[1].T, transform)
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        kept = labels != IGNORE
        topk = topk_of(batch, 310)[kept]
        of_kd = distillation_loss(
            logits[kept], labels[kept], topk, alpha=1.0, temperature=temperature
        ).sum() / int(topk.has_target.sum())
        ce = F.cross_entropy(logits[kept], labels[kept])
        expected = 0.3 * of_kd + 0.7 * ce
        expected.backward()
        options = {"alpha": 0.3, "temperature": temperature, "chunk": 7}
        found = [leaf.clone().requires_grad_() for leaf in (hidden, head)]
        value = sparse_kd_loss(found[0], batch, head=found[1], transform=transform, **options)
        value.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, two in zip(found, leaves, strict=True):
            assert torch.allclose(one.grad, two.grad.float(), atol=1e-6)
        again = [leaf.clone().requires_grad_() for leaf in (hidden, head)]
        value = sparse_kd_loss(transformed(again[0] @ again[1].T, transform), batch, **options)
        value.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, two in zip(again, leaves, strict=True):
            assert torch.allclose(one.grad, two.grad.float(), atol=1e-6)


def test_a_bare_loop_has_the_losses_of_training(tiny_cache: Params) -> None:
    """The same rows through a model of transformers and through our own trainer's module."""
    model = AutoModelForCausalLM.from_pretrained(tiny_cache.paths.teacher)
    ours = DistillationLoss(
        open_student(tiny_cache.paths.teacher), dtype=torch.float32, head_chunk=50
    )
    batch = a_batch(tiny_cache)
    (wanted,) = list(first_rows(CachedTargets(open_cache(tiny_cache)), 4, 4))
    total, _, _ = ours(
        wanted,
        alpha=0.5,
        temperature=2.0,
        divergence="reverse_kl",
        target_weight=wanted.num_labels / wanted.num_targets,
    )
    logits = model(**model_inputs(batch)).logits
    loss = sparse_kd_loss(logits, batch, temperature=2.0, divergence="reverse_kl")
    assert loss.item() == pytest.approx(total.item() / wanted.num_labels, abs=1e-6)


def test_a_model_learns(tiny_cache: Params) -> None:
    torch.manual_seed(0)
    dataset = dataset_of(tiny_cache)
    loader = DataLoader(
        dataset, batch_size=8, sampler=ShardSampler(dataset, seed=0), collate_fn=collate
    )
    config = AutoModelForCausalLM.from_pretrained(tiny_cache.paths.teacher).config
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in loader:
        loss = sparse_kd_loss(model(**model_inputs(batch)).logits, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_half_precision_logits_are_computed_in_float32(tiny_cache: Params) -> None:
    batch = a_batch(tiny_cache)
    logits = torch.randn(4, 32, 310).bfloat16().requires_grad_()
    loss = sparse_kd_loss(logits, batch)
    assert loss.dtype == torch.float32
    exact = logits.detach().float().requires_grad_()
    assert loss.item() == pytest.approx(sparse_kd_loss(exact, batch).item(), rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_bad_requests_are_one_sentence(tiny_cache: Params, tmp_path: Path) -> None:
    batch = a_batch(tiny_cache)
    logits = torch.randn(4, 32, 310)
    with pytest.raises(MismatchError, match="temperature=3 is not among the stored"):
        sparse_kd_loss(logits, batch, temperature=3.0)
    with pytest.raises(ParamsError, match=r"alpha=1\.5 is outside 0\.\.1"):
        sparse_kd_loss(logits, batch, alpha=1.5)
    with pytest.raises(MismatchError, match=r"positions \(4, 31\), and the batch \(4, 32\)"):
        sparse_kd_loss(logits[:, :-1], batch)
