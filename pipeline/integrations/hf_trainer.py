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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from pipeline.errors import DecantError, MismatchError, ParamsError
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
from pipeline.model.huggingface import (
    document_options,
    keeps_documents_apart,
    require_own_logits,
    run_body,
)
from pipeline.model.logit_transform import LogitTransform

_BATCH = "cache_batch"
"""The argument of the model's forward that asks for the loss of a batch."""
_TEACHER = "teacher_"


class DistillationMixin:
    """The loss, the order of rows and the log entries of distillation; goes before a Trainer class.

    Datasets are a `CacheDataset`, in the order of `ShardSampler`, or, on one process, an
    `IterableCacheDataset`. The logs have `ce` and `divergence`, in nats per position, beside
    `loss`; those of an evaluation are exact means over its positions, at the objective's own
    temperature (on several processes, rows that accelerate repeats to fill the last batch count
    twice).

    Args:
        model, args, data_collator, kwargs: what the Trainer takes.
        objective: the weight of the divergence, the temperature and the divergence.
        head_chunk: positions whose logits are in memory at once; None computes all logits of a
            batch, by the model's own forward, which DeepSpeed's ZeRO 3 needs.

    Raises:
        ParamsError: several GPUs in one process, which transformers uses by `DataParallel`; label
            smoothing; ZeRO 3 with chunks. On the first use of a dataset also: a stream on several
            processes, or an adapter on the head with chunks.
        MismatchError: on the first use of a dataset, the model has fewer vocabulary rows than the
            cache's ids.
        DecantError: likewise, the teacher kept documents apart and the model does not; or, with
            chunks, the logits are not hidden states times the head's matrix, or the head has a
            bias.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *,
        objective: Objective | None = None,
        head_chunk: int | None = 1024,
        **kwargs: Any,
    ) -> None:
        self.objective = objective or Objective()
        self._head_chunk = head_chunk
        self._counts: Counts | None = None
        self._sums: dict[bool, Tensor] = {}
        self._model_with_loss: Any = None
        self._sampler: ShardSampler | None = None
        super().__init__(  # type: ignore[call-arg]  # of the Trainer class that follows
            model=model, args=args, data_collator=data_collator or collate, **kwargs
        )
        trainer: Any = self
        _require_supported(trainer.args, head_chunk)
        trainer.args.remove_unused_columns = False  # the teacher's are not among the model's
        trainer.model_accepts_loss_kwargs = True  # so that the number of labels is counted
        trainer.add_callback(_EpochOfSampler(self))

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's DataLoader, once model and dataset are known to go together."""
        trainer: Any = self
        self._require_fitting(trainer.train_dataset)
        parent: Any = super()
        return parent.get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """See `get_train_dataloader`."""
        trainer: Any = self
        found = trainer.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(found, str):
            found = trainer.eval_dataset[found]
        self._require_fitting(found)
        parent: Any = super()
        return parent.get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """See `get_train_dataloader`."""
        self._require_fitting(test_dataset)
        parent: Any = super()
        return parent.get_test_dataloader(test_dataset)

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
        if self._head_chunk is not None and not return_outputs:
            found = model(**model_inputs(inputs), **{_BATCH: inputs, "counts": counts})
            sums = LossSums(*(found[name] for name in ("total", "ce", "divergence")))
        else:
            options = model_inputs(inputs)
            if (positions := options.get("position_ids")) is not None:
                options |= document_options(_base(trainer.model), positions)
            outputs = model(**options)
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
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits.detach(), inputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Add cross-entropy and divergence to the results."""
        self._sums.pop(False, None)
        parent: Any = super()
        output = parent.evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._means(False, f"{metric_key_prefix}_"))
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add cross-entropy and divergence of training since the last log."""
        if "loss" in logs:
            logs.update(self._means(True, ""))
        parent: Any = super()
        parent.log(logs, *args, **kwargs)

    def _means(self, training: bool, prefix: str) -> dict[str, float]:
        """Return the means over what was added, on all processes, and start again."""
        trainer: Any = self
        added = self._sums.pop(training, None)
        if added is None:
            return {}
        ce, divergence, labels, targets = trainer.accelerator.reduce(added, "sum").tolist()
        return {
            f"{prefix}ce": ce / max(1.0, labels),
            f"{prefix}divergence": divergence / max(1.0, targets),
        }

    def _prepare_inputs(self, inputs: Row) -> Row:
        """Move a batch; DeepSpeed would round the teacher's numbers to the model's format."""
        trainer: Any = self
        teacher = {name: t for name, t in inputs.items() if name.startswith(_TEACHER)}
        others = {name: t for name, t in inputs.items() if name not in teacher}
        parent: Any = super()
        device = trainer.args.device
        moved = {name: tensor.to(device) for name, tensor in teacher.items()}
        return {**parent._prepare_inputs(others), **moved}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, CacheDataset):
            seed = trainer.args.data_seed
            seed = trainer.args.seed if seed is None else seed
            self._sampler = ShardSampler(dataset, seed=seed)
            return self._sampler
        parent: Any = super()
        return parent._get_train_sampler(train_dataset)

    def _require_fitting(self, dataset: Any) -> None:
        """Check that the model can learn from the dataset, and let its forward give the loss."""
        trainer: Any = self
        base = _base(trainer.model)
        if isinstance(dataset, IterableCacheDataset):
            if trainer.args.world_size > 1:
                raise ParamsError(
                    f"accelerate would divide among {trainer.args.world_size} processes what an "
                    "IterableCacheDataset has divided already: pass the CacheDataset itself"
                )
            dataset = dataset.dataset
        if isinstance(dataset, CacheDataset) and not is_deepspeed_zero3_enabled():
            _require_model(base, dataset)
        if self._head_chunk is not None and self._model_with_loss is not base:
            add_loss(base, self.objective, self._head_chunk)
            self._model_with_loss = base

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


class _EpochOfSampler(TrainerCallback):  # type: ignore[misc]
    """Tell the sampler the epoch: accelerate does not, where a resumed epoch skips batches."""

    def __init__(self, trainer: DistillationMixin) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        sampler = self._trainer._sampler
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))


def _base(model: Any) -> Any:
    """Return the model of transformers, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _require_supported(args: Any, head_chunk: int | None) -> None:
    if args.n_gpu > 1:
        raise ParamsError(
            f"{args.n_gpu} GPUs in one process would be used by torch's DataParallel, which cannot "
            "carry this loss: start one process for each by torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )
    if args.label_smoothing_factor:
        raise ParamsError(
            f"label_smoothing_factor={args.label_smoothing_factor:g} has no meaning beside a "
            "teacher's distribution: leave it out"
        )
    if head_chunk is not None and is_deepspeed_zero3_enabled():
        raise ParamsError(
            f"head_chunk={head_chunk} needs the head's whole matrix, which DeepSpeed's ZeRO 3 "
            "shards: set head_chunk=None"
        )


def _require_model(model: Any, dataset: CacheDataset) -> None:
    """Refuse a model that could not learn from the targets, or would learn from wrong ones."""
    made_from, rows = dataset.fingerprint, len(model.get_input_embeddings().weight)
    if rows < made_from.vocab_size:
        raise MismatchError(
            f"the model has {rows} vocabulary rows, the cache {made_from.vocab_size} ids: choose a "
            "model that shares the teacher's ids"
        )
    if made_from.document_mask and not _evaluated(
        model, lambda: keeps_documents_apart(model, made_from.vocab_size)
    ):
        raise DecantError(
            f"a {model.config.model_type!r} model attends across the documents of a row, and the "
            "cache's teacher did not: capture with prepare.document_mask=false, or choose another "
            "architecture"
        )


def _evaluated(model: Any, function: Any) -> Any:
    """Return what a function returns while the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        return function()
    finally:
        model.train(training)


def add_loss(model: Any, objective: Objective, head_chunk: int) -> None:
    """Let a model's forward return the loss sums of a batch if it is given one as `cache_batch`.

    Without that argument, it is the forward that it was, so that generation and other callers see
    no difference.

    Raises:
        DecantError: the head has a bias, or the logits are not hidden states times its matrix.
        ParamsError: the head has an adapter.
    """
    head, kind = model.get_output_embeddings(), model.config.model_type
    if hasattr(head, "base_layer"):
        raise ParamsError(
            f"the head of this {kind!r} model has an adapter, which a loss by chunks does not see: "
            "set head_chunk=None"
        )
    if getattr(head, "bias", None) is not None:
        raise DecantError(
            f"the head of this {kind!r} model has a bias, which a loss by chunks does not support: "
            "set head_chunk=None"
        )
    folder = Path(model.config.name_or_path or kind)
    _evaluated(model, lambda: require_own_logits(folder, model))
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
