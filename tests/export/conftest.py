"""Small random models whose rows fill blocks of 32, and tokenizers that llama.cpp has names of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import PreTrainedTokenizerFast

from pipeline.config.delivery_params import ExportParams
from tests.conftest import make_sentences
from tests.study.conftest import make_model

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_digit_tokenizer(folder: Path) -> None:
    """A byte-level BPE that splits as SmolLM2's: each digit alone, then GPT-2's pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_sentences(80, seed=1), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, biases, a tokenizer as Qwen2.5's with a chat template."""
    return make_model(tmp_path_factory.mktemp("qwen") / "model", "qwen2", **SHAPE)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of its own, no biases, a tokenizer as SmolLM2's."""
    return make_llama(tmp_path_factory.mktemp("llama") / "model")


def make_llama(folder: Path, **changes: Any) -> Path:
    make_model(folder, "llama", **(SHAPE | changes))
    make_digit_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def export_params(**changes: Any) -> ExportParams:
    values: dict[str, Any] = {
        "dtype": "bfloat16",
        "gguf": ("f32", "f16", "bf16", "q8_0"),
        "license": None,
        "base_model": None,
        "text": None,
        "prompts": 5,
        "prompt_tokens": 9,
        "max_new_tokens": 8,
        "lines": 40,
        "min_agreement": 0.5,
    }
    return ExportParams(**(values | changes))


def text_of_many_lines() -> str:
    """Sentences, numbers, scripts, white space, special tokens, and what NFC changes."""
    lines = [f"\tif x == {n}:\n    return '{n * 37}'  # <|endoftext|> <tool>" for n in range(8)]
    lines += [
        "数据模型 训练 2024年",
        "e\u0301tude  Ångstrom",
        "don't  WE'LL  stop!?\n\n\n  trailing  ",
    ]
    return "\n".join([*make_sentences(30, seed=3), *lines])


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
