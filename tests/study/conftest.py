"""Small random models with a tokenizer as Qwen2.5's: NFC, its splitting, its special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pipeline.config.delivery_params import StudyParams
from pipeline.study.subject import Subject
from tests.conftest import make_sentences

ENTRIES, SPECIAL, ROWS = 320, 3, 352  # in Qwen2.5: 151,643, 22 and 151,936

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_qwen_tokenizer(folder: Path, **changes: Any) -> None:
    """Byte-level BPE of 320 entries and 3 special ones; `changes` replace parts of it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = changes.get("normalizer", normalizers.NFC())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES,
        initial_alphabet=changes.get("alphabet", pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*make_sentences(80, seed=1), "数据模型 " * 40], trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = _CHATML
    fast.save_pretrained(folder)


def make_model(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model of 3 layers whose norms and biases are not at 1 and 0, and its tokenizer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "eos_token_id": ENTRIES + SPECIAL - 1,
        **changes,
    }
    model: Any
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    make_qwen_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qwen") / "model", "qwen2")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama") / "model", "llama")


def study_params(**changes: Any) -> StudyParams:
    values: dict[str, Any] = {
        "prompt": "the cat sees a river",
        "max_new_tokens": 5,
        "temperature": 0.8,
        "batch_sizes": (1, 3),
        "prompt_tokens": 12,
        "repeats": 1,
        "dtype": "float32",
    }
    return StudyParams(**(values | changes))


def make_subject(folder: Path, layer: int = 1, **changes: Any) -> Subject:
    return Subject(folder, study_params(**changes), layer=layer, device=torch.device("cpu"), seed=0)
