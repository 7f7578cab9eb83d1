"""Distillation from a cache by TRL's SFTTrainer.

    trainer = DistillationSFTTrainer(
        model=model,
        args=SFTConfig("out", per_device_train_batch_size=8),
        train_dataset=CacheDataset("cache/corpus.zarr", "cache/logits.zarr"),
        processing_class=tokenizer,
        objective=Objective(alpha=0.5, temperature=2.0),
    )

SFTTrainer computes its own loss in `compute_loss`, which TRL's documentation says to override in a
subclass, so the mixin of `hf_trainer.py` takes its place. What SFTTrainer does to a dataset does
not apply to rows that are tokenized and packed, and it takes none but those of the library
`datasets`. So it is made with one row, which `dataset_kwargs` asks it to leave as it is, and the
datasets proper are set afterwards.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from pipeline.errors import ParamsError
from pipeline.integrations.hf_trainer import DistillationMixin
from pipeline.runtime.optional import require

_TRL = require("trl", "trl", "pipeline.integrations.trl_trainer")


class DistillationSFTTrainer(DistillationMixin, _TRL.SFTTrainer):  # type: ignore[misc, name-defined]
    """TRL's SFTTrainer with the loss of distillation; see `DistillationMixin`."""

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        config = _TRL.SFTConfig() if args is None else args
        if not isinstance(config, _TRL.SFTConfig):
            raise ParamsError(f"args is a {type(config).__name__}: pass TRL's SFTConfig")
        prepared = {"skip_prepare_dataset": True}
        config.dataset_kwargs = {**(config.dataset_kwargs or {}), **prepared}
        one_row = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            kwargs[name] = None if dataset is None else one_row
        super().__init__(model, config, **kwargs)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
