"""The Trainer of transformers with a cache: the losses and weights of our own training."""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, OPTConfig, TrainingArguments

from pipeline.config.params import Params
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.integrations.cache_dataset import (
    IterableCacheDataset,
    ShardSampler,
    collate,
    model_inputs,
)
from pipeline.integrations.hf_trainer import DistillationTrainer, add_loss
from pipeline.integrations.kd_loss import Objective, sparse_kd_loss
from pipeline.training.run import run_training
from tests.helpers import change, from_folder, losses, weights
from tests.integrations.test_cache_dataset import dataset_of
from tests.training.ranks import run_ranks

STEPS = 20
PEAK = 0.002


def same_recipe(params: Params, **train: Any) -> Params:
    """Training by `stages/train.py` as Trainer can do it too: a constant rate, no decay."""
    recipe = {
        "steps": STEPS,
        "batch_rows": 4,
        "warmup_steps": 0,
        "learning_rate": PEAK,
        "min_learning_rate": PEAK,
        "weight_decay": 0.0,
        "eval_every": STEPS,
        "eval_rows": 1000,
        "shuffle_shards": 4,
        "temperature": 2.0,
        "alpha": 0.7,
    }
    return change(from_folder(params, params.paths.teacher), train=recipe | train)


def arguments(params: Params, folder: Path, **changes: Any) -> TrainingArguments:
    train = params.train
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": train.batch_rows,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "learning_rate": PEAK,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "max_grad_norm": train.max_grad_norm,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "seed": params.seed,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**values | changes)


def trainer_of(params: Params, folder: Path, **options: Any) -> DistillationTrainer:
    changes = options.pop("arguments", {})
    torch.manual_seed(0)
    train = params.train
    return DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(params.paths.teacher),
        args=arguments(params, folder, **changes),
        train_dataset=options.pop("train_dataset", dataset_of(params)),
        eval_dataset=dataset_of(params, "validation"),
        objective=Objective(
            alpha=train.alpha, temperature=train.temperature, divergence=train.divergence
        ),
        **options,
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("head_chunk", [7, None])
def test_losses_are_those_of_our_own_training(
    head_chunk: int | None, accumulation: int, tiny_cache: Params, tmp_path: Path
) -> None:
    recipe = {"gradient_accumulation_steps": accumulation, "batch_rows": 4 // accumulation}
    params = same_recipe(tiny_cache, **recipe)  # no more steps than an epoch has
    run_training(params, "ours")
    folder = params.paths.runs / "ours"
    curves = losses(folder)
    trainer = trainer_of(params, tmp_path / "out", head_chunk=head_chunk)
    trainer.train()
    for name, ours in (
        ("loss", "train/loss"),
        ("ce", "train/ce"),
        ("divergence", "train/divergence"),
    ):
        assert logged(trainer, name)[:STEPS] == pytest.approx(curves[ours][1], abs=1e-5), name
    found = dict(trainer.model.named_parameters())
    for name, tensor in weights(folder).items():
        off = (tensor - found[name]).norm() / tensor.norm()
        assert off < 1e-4, name
    ce = trainer.evaluate()["eval_ce"]
    assert ce == pytest.approx(curves["validation/loss"][1][-1], abs=1e-5)


def train_on_a_rank(params: Params, folder: Path) -> None:
    trainer = trainer_of(params, folder)
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save([logged(trainer, name) for name in ("loss", "ce", "divergence")], folder / "log")


def test_two_processes_have_the_losses_of_one(
    forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    """DistributedDataParallel, with the mean over the positions of both."""
    params = same_recipe(tiny_cache)
    run_training(params, "ours")
    (tmp_path / "out").mkdir()
    halved = change(params, train={"batch_rows": 2})
    run_ranks(forkserver, 2, train_on_a_rank, halved, tmp_path / "out")
    curves = losses(params.paths.runs / "ours")
    found = torch.load(tmp_path / "out" / "log", weights_only=True)
    for values, name in zip(found, ("loss", "ce", "divergence"), strict=True):
        assert values[:STEPS] == pytest.approx(curves[f"train/{name}"][1], abs=1e-5), name


def test_a_stopped_training_continues_exactly(tiny_cache: Params, tmp_path: Path) -> None:
    params = same_recipe(tiny_cache)
    whole = trainer_of(params, tmp_path / "whole")
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 8, "save_total_limit": 1}
    first = trainer_of(params, tmp_path / "parts", arguments={**saving, "max_steps": 8})
    first.train()
    second = trainer_of(params, tmp_path / "parts", arguments=saving)
    second.train(resume_from_checkpoint=True)
    assert logged(second, "loss")[:STEPS] == pytest.approx(logged(whole, "loss")[:STEPS], abs=1e-6)


def test_a_stream_trains(tiny_cache: Params, tmp_path: Path) -> None:
    params = same_recipe(tiny_cache)
    rows = len(dataset_of(params))
    stream = IterableCacheDataset(dataset_of(params), seed=params.seed)
    trainer = trainer_of(params, tmp_path, train_dataset=stream)
    trainer.train()
    by_number = trainer_of(params, tmp_path)
    by_number.train()
    steps = min(STEPS, rows // 4)
    assert logged(trainer, "loss")[:steps] == pytest.approx(
        logged(by_number, "loss")[:steps], abs=1e-5
    )


def test_adapters_of_peft_alone_learn(tiny_cache: Params, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    params = same_recipe(tiny_cache)
    model = AutoModelForCausalLM.from_pretrained(params.paths.teacher)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trainer = DistillationTrainer(
        model=adapted,
        args=arguments(params, tmp_path, learning_rate=0.02),
        train_dataset=dataset_of(params),
        objective=Objective(alpha=1.0, divergence="reverse_kl"),
    )
    before = adapted.state_dict()["base_model.model.lm_head.weight"].clone()
    trainer.train()
    assert torch.equal(adapted.state_dict()["base_model.model.lm_head.weight"], before)
    changed = [
        p.detach().abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name
    ]
    assert all(changed)


def test_evaluation_may_ask_for_logits(tiny_cache: Params, tmp_path: Path) -> None:
    params = same_recipe(tiny_cache)

    def accuracy(prediction: Any) -> dict[str, float]:
        chosen = prediction.predictions.argmax(-1)[:, :-1]
        labels = prediction.label_ids[:, 1:]
        return {"accuracy": float((chosen == labels)[labels != -100].mean())}

    trainer = trainer_of(params, tmp_path, compute_metrics=accuracy)
    found = trainer.evaluate()
    assert 0.0 <= found["eval_accuracy"] <= 1.0
    plain = trainer_of(params, tmp_path).evaluate()
    assert found["eval_ce"] == pytest.approx(plain["eval_ce"], abs=1e-6)
    assert found["eval_divergence"] == pytest.approx(plain["eval_divergence"], abs=1e-6)


def test_a_model_is_itself_without_a_batch(tiny_cache: Params) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_cache.paths.teacher).eval()
    batch = next(iter(DataLoader(dataset_of(tiny_cache), batch_size=2, collate_fn=collate)))
    before = model(**model_inputs(batch)).logits
    add_loss(model, Objective(), 16)
    assert torch.equal(model(**model_inputs(batch)).logits, before)
    assert (
        model.generate(batch["input_ids"][:, :4], max_new_tokens=2, do_sample=False).shape[1] == 6
    )


def test_what_would_train_wrongly_is_refused(
    tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = same_recipe(tiny_cache)
    with pytest.raises(ParamsError, match=r"label_smoothing_factor=0\.1 has no meaning"):
        trainer_of(params, tmp_path, arguments={"label_smoothing_factor": 0.1})
    stream = IterableCacheDataset(dataset_of(params), seed=0, rank=0, world_size=2)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    trainer = trainer_of(params, tmp_path, train_dataset=stream)
    with pytest.raises(ParamsError, match=r"among 2 processes .*: pass the CacheDataset"):
        trainer.train()
    with pytest.raises(ParamsError, match=r"among 2 processes .*: pass the CacheDataset"):
        trainer.evaluate(stream)
    monkeypatch.undo()
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ParamsError, match=r"2 GPUs in one process .* torchrun"):
        trainer_of(params, tmp_path)


def trainer_with(model: Any, params: Params, folder: Path) -> DistillationTrainer:
    return DistillationTrainer(model, arguments(params, folder), train_dataset=dataset_of(params))


def test_a_model_that_cannot_learn_from_the_cache_is_refused(
    tiny_cache: Params, tmp_path: Path
) -> None:
    """Before the first step, in a sentence."""
    params = same_recipe(tiny_cache)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    of_positions = AutoModelForCausalLM.from_config(
        OPTConfig(vocab_size=320, word_embed_proj_dim=32, max_position_embeddings=64, **shape)
    )
    with pytest.raises(DecantError, match=r"'opt' model attends across the documents"):
        trainer_with(of_positions, params, tmp_path).train()
    small = AutoModelForCausalLM.from_pretrained(params.paths.teacher)
    small.resize_token_embeddings(200)
    with pytest.raises(MismatchError, match="200 vocabulary rows, the cache 300 ids"):
        trainer_with(small, params, tmp_path).train()
    batch = next(iter(DataLoader(dataset_of(params), batch_size=2, collate_fn=collate)))
    with pytest.raises(MismatchError, match="is beyond the student's 200 vocabulary rows"):
        sparse_kd_loss(torch.randn(2, 32, 200), batch)


def test_an_adapter_on_the_head_is_refused(tiny_cache: Params, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    params = same_recipe(tiny_cache)
    model = AutoModelForCausalLM.from_pretrained(params.paths.teacher)
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ParamsError, match=r"has an adapter, .*head_chunk=None"):
        trainer_with(peft.get_peft_model(model, adapters), params, tmp_path).train()


def test_a_resumed_epoch_has_its_own_order(tiny_cache: Params, tmp_path: Path) -> None:
    """Where batches are skipped, accelerate does not tell a sampler on several processes."""
    trainer = trainer_of(same_recipe(tiny_cache), tmp_path)
    trainer.get_train_dataloader()
    trainer.state.epoch = 2.4
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    expected = ShardSampler(dataset_of(tiny_cache), seed=tiny_cache.seed)
    expected.set_epoch(2)
    assert list(trainer._sampler) == list(expected)


def test_deepspeed_does_not_round_the_teacher(tiny_cache: Params, tmp_path: Path) -> None:
    """It casts all floating tensors of a batch to the model's format, where it can see them."""
    trainer = trainer_of(same_recipe(tiny_cache), tmp_path)
    trainer.is_deepspeed_enabled = True
    batch = next(iter(DataLoader(dataset_of(tiny_cache), batch_size=2, collate_fn=collate)))
    prepared = trainer._prepare_inputs(batch)
    assert prepared.keys() == batch.keys()
    assert all(torch.equal(prepared[name], batch[name]) for name in batch)


def test_a_new_model_of_model_init_gets_the_loss(tiny_cache: Params, tmp_path: Path) -> None:
    params = same_recipe(tiny_cache)
    trainer = DistillationTrainer(
        args=arguments(params, tmp_path, max_steps=2),
        train_dataset=dataset_of(params),
        model_init=lambda: AutoModelForCausalLM.from_pretrained(params.paths.teacher),
    )
    trainer.train()
    trainer.train()
    assert len(logged(trainer, "ce")) == 2


def test_a_head_with_a_bias_is_refused(tiny_cache: Params) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_cache.paths.teacher)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=True)
    model.set_output_embeddings(head)
    with pytest.raises(DecantError, match=r"has a bias, .*head_chunk=None"):
        add_loss(model, Objective(), 16)
