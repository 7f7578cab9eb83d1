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

from pipeline.integrations.hf_trainer import DistillationMixin
from pipeline.runtime.optional import require

_TRL = require("trl", "trl", "pipeline.integrations.trl_trainer")


class DistillationSFTTrainer(DistillationMixin, _TRL.SFTTrainer):  # type: ignore[misc, name-defined]
    """TRL's SFTTrainer with the loss of distillation; see `DistillationMixin`."""

    def __init__(
        self,
        *args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        config = kwargs.get("args")
        if config is None:
            config = kwargs["args"] = _TRL.SFTConfig()
        prepared = {"skip_prepare_dataset": True}
        config.dataset_kwargs = {**(config.dataset_kwargs or {}), **prepared}
        one_row = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
        has_rows = [
            None if dataset is None else one_row for dataset in (train_dataset, eval_dataset)
        ]
        super().__init__(*args, train_dataset=has_rows[0], eval_dataset=has_rows[1], **kwargs)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
