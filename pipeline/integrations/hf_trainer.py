"""Distillation from a cache by the Trainer of transformers, with everything that belongs to it:
loggers, callbacks, DeepSpeed, accelerate, checkpoints on the hub.

    trainer = DistillationTrainer(
        model=model,
        args=TrainingArguments("out", per_device_train_batch_size=8),
        train_dataset=CacheDataset("cache/corpus.zarr", "cache/logits.zarr"),
        objective=Objective(alpha=0.5, temperature=2.0),
    )
    trainer.train()

The loss is that of `stages/train.py`, in the same normalisation: the sum over all positions of an
optimizer step, on all processes, is divided once. It is computed inside the model's own forward, so
that DistributedDataParallel, FSDP and DeepSpeed see a forward of the module that they wrapped, and
the head's weight is where they keep it; hidden states go through head and loss by chunks, and the
logits of a batch never exist as a whole (`pipeline/losses/chunked.py`).

`DistillationMixin` does the same for any subclass of Trainer that calls `compute_loss` as Trainer
does, for example TRL's SFTTrainer (`pipeline/integrations/trl_trainer.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from pipeline.errors import DecantError, ParamsError
from pipeline.integrations.cache_dataset import (
    CacheDataset,
    IterableCacheDataset,
    Row,
    ShardSampler,
    collate,
    model_inputs,
)
from pipeline.integrations.kd_loss import Counts, Objective, kd_loss_sums
from pipeline.losses.chunked import LossSums
from pipeline.model.huggingface import run_body
from pipeline.model.logit_transform import LogitTransform

_BATCH = "cache_batch"
"""The argument of the model's forward that asks for the loss of a batch."""


class DistillationMixin:
    """The loss, the order of rows and the log entries of distillation; goes before a Trainer class.

    Datasets are a `CacheDataset`, in the order of `ShardSampler`, or, on one process, an
    `IterableCacheDataset`. The logs have `ce` and `divergence`, in nats per position, beside
    `loss`; those of an evaluation are exact means over its positions, at the objective's own
    temperature.

    Args:
        args: what the Trainer takes.
        objective: the weight of the divergence, the temperature and the divergence.
        head_chunk: positions whose logits are in memory at once; None computes all logits of a
            batch, by the model's own forward, which DeepSpeed's ZeRO 3 needs.
        kwargs: what the Trainer takes.

    Raises:
        DecantError: the head has a bias, which chunks do not support.
        ParamsError: several GPUs in one process, which transformers uses by `DataParallel`; a
            stream on several processes; or label smoothing.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        head_chunk: int | None = 1024,
        **kwargs: Any,
    ) -> None:
        self.objective = objective or Objective()
        self._counts: Counts | None = None
        self._sums: dict[bool, Tensor] = {}
        kwargs.setdefault("data_collator", collate)
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _require_supported(trainer)
        trainer.args.remove_unused_columns = False  # the teacher's are not among the model's
        trainer.model_accepts_loss_kwargs = True  # so that the number of labels is counted
        self._chunked = head_chunk is not None
        if head_chunk is not None:
            base = trainer.model
            base = base.get_base_model() if hasattr(base, "get_base_model") else base
            add_loss(base, self.objective, head_chunk)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Row], num_batches: int, device: torch.device
    ) -> tuple[list[Row], Any]:
        """Take the batches of one optimizer step, and count their positions on all processes."""
        trainer: Any = super()
        batches, number = trainer.get_batch_samples(epoch_iterator, num_batches, device)
        self._counts = self._counted(batches)
        return batches, number

    def compute_loss(
        self,
        model: Any,
        inputs: Row,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss; with `return_outputs`, also the model's outputs with all logits."""
        trainer: Any = self
        training = model.training
        own = Counts.of(inputs)
        counts = self._counts if training and self._counts is not None else own
        outputs = None
        if self._chunked and not return_outputs:
            found = model(**model_inputs(inputs), **{_BATCH: inputs, "counts": counts})
            sums = LossSums(*(found[name] for name in ("total", "ce", "divergence")))
        else:
            outputs = model(**model_inputs(inputs))
            sums = kd_loss_sums(outputs.logits, inputs, self.objective, counts)
        self._add(sums, own, training)
        loss = sums.total / max(1.0, counts.labels)
        if training and trainer.args.average_tokens_across_devices:
            loss = loss * trainer.accelerator.num_processes  # which the engines divide by
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Row, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return loss, logits and labels; logits are computed only if they are asked for."""
        trainer: Any = self
        inputs = trainer._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits.detach(), inputs["labels"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add cross-entropy and divergence since the last log, over all processes."""
        trainer: Any = self
        for training, prefix in ((True, ""), (False, "eval_")):
            if f"{prefix}loss" in logs and training in self._sums:
                sums = trainer.accelerator.reduce(self._sums.pop(training), "sum").tolist()
                ce, divergence, labels, targets = sums
                logs[f"{prefix}ce"] = ce / max(1.0, labels)
                logs[f"{prefix}divergence"] = divergence / max(1.0, targets)
        parent: Any = super()
        parent.log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, CacheDataset):
            seed = trainer.args.data_seed
            return ShardSampler(dataset, seed=trainer.args.seed if seed is None else seed)
        parent: Any = super()
        return parent._get_train_sampler(train_dataset)

    def _counted(self, batches: list[Row]) -> Counts:
        trainer: Any = self
        own = [Counts.of(batch) for batch in batches]
        found = torch.tensor(
            [sum(c.labels for c in own), sum(c.targets for c in own)],
            dtype=torch.float64 if trainer.args.device.type == "cpu" else torch.float32,
            device=trainer.args.device,
        )
        if trainer.args.average_tokens_across_devices:
            found = trainer.accelerator.reduce(found, "sum")
        return Counts(*found.tolist())

    def _add(self, sums: LossSums, counts: Counts, training: bool) -> None:
        added = torch.stack((sums.ce, sums.divergence)).detach()
        added = torch.cat((added, added.new_tensor((counts.labels, counts.targets))))
        before = self._sums.get(training)
        self._sums[training] = added if before is None else before + added


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]
    """The Trainer of transformers with the loss of distillation; see `DistillationMixin`."""


def _require_supported(trainer: Any) -> None:
    args = trainer.args
    if args.n_gpu > 1:
        raise ParamsError(
            f"{args.n_gpu} GPUs in one process would be used by torch's DataParallel, which cannot "
            "carry this loss: start one process for each by torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )
    if args.world_size > 1 and isinstance(trainer.train_dataset, IterableCacheDataset):
        raise ParamsError(
            f"accelerate would divide among {args.world_size} processes what an "
            "IterableCacheDataset has divided already: pass the CacheDataset itself"
        )
    if args.label_smoothing_factor:
        raise ParamsError(
            f"label_smoothing_factor={args.label_smoothing_factor:g} has no meaning beside a "
            "teacher's distribution: leave it out"
        )


def add_loss(model: Any, objective: Objective, head_chunk: int) -> None:
    """Let a model's forward return the loss sums of a batch if it is given one as `cache_batch`.

    Without that argument, it is the forward that it was, so that generation and other callers see
    no difference.

    Raises:
        DecantError: the head has a bias.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise DecantError(
            f"the head of this {model.config.model_type!r} model has a bias, which a loss by "
            "chunks does not support: set head_chunk=None"
        )
    transform = LogitTransform.of_config(model.config)
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        batch = kwargs.pop(_BATCH, None)
        if batch is None:
            return original(*args, **kwargs)
        hidden = run_body(model, kwargs["input_ids"], kwargs.get("position_ids"))
        sums = kd_loss_sums(
            hidden, batch, objective, kwargs["counts"], head.weight, transform, head_chunk
        )
        return {"total": sums.total, "ce": sums.ce, "divergence": sums.divergence}

    model.forward = forward
