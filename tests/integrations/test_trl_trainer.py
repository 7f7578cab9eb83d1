"""TRL's SFTTrainer with a cache: the losses of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.params import Params
from pipeline.integrations.kd_loss import Objective
from tests.integrations.test_cache_dataset import dataset_of
from tests.integrations.test_hf_trainer import logged, same_recipe, trainer_of

trl = pytest.importorskip("trl")


@pytest.mark.parametrize("head_chunk", [16, None])
def test_losses_are_those_of_the_trainer(
    head_chunk: int | None, tiny_cache: Params, tmp_path: Path
) -> None:
    from pipeline.integrations.trl_trainer import DistillationSFTTrainer

    params = same_recipe(tiny_cache)
    plain = trainer_of(params, tmp_path / "plain", head_chunk=head_chunk)
    plain.train()
    same: dict[str, Any] = {
        name: value
        for name, value in plain.args.to_dict().items()
        if name in SAME and value is not None
    }
    torch.manual_seed(0)
    trainer = DistillationSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(params.paths.teacher),
        args=trl.SFTConfig(**same | {"output_dir": str(tmp_path / "sft")}),
        train_dataset=dataset_of(params),
        eval_dataset=dataset_of(params, "validation"),
        processing_class=AutoTokenizer.from_pretrained(params.paths.teacher),
        objective=Objective(alpha=params.train.alpha, temperature=params.train.temperature),
        head_chunk=head_chunk,
    )
    trainer.train()
    for name in ("loss", "ce", "divergence"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), abs=1e-5), name
    assert trainer.evaluate()["eval_ce"] == pytest.approx(plain.evaluate()["eval_ce"], abs=1e-5)


SAME = (
    "bf16",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "logging_steps",
    "logging_first_step",
    "save_strategy",
    "report_to",
    "seed",
    "use_cpu",
    "dataloader_pin_memory",
    "disable_tqdm",
)
"""Arguments that both configs have; the rest of SFTConfig's defaults differ and do not matter."""
