"""Small random models, their tokenizers, and text for both, made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import ByteFallback as ByteFallbackDecoder
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Fuse as FuseDecoder
from tokenizers.decoders import Replace as ReplaceDecoder
from tokenizers.decoders import Sequence as DecoderSequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.model.decoder import (
    ModelConfig,
    StudentModel,
)
from pipeline.planning.decoder_shape import Shape
from tests.helpers import SMALL

VOCABULARY_ROWS = 320  # more than the tokenizer's 300 ids, as in Qwen2.5


def make_sentences(count: int, seed: int) -> list[str]:
    """Documents with enough structure that a small model can learn something."""
    generator = random.Random(seed)
    nouns = ["cat", "teacher", "river", "logit", "student", "cache", "tower"]
    verbs = ["sees", "keeps", "finds", "moves", "reads"]
    documents = []
    for number in range(count):
        words = [f"Note {number}:"]
        for _ in range(generator.randint(5, 40)):
            words.append(f"the {generator.choice(nouns)} {generator.choice(verbs)} a")
            words.append(f"{generator.choice(nouns)}.")
        documents.append(" ".join(words))
    return documents


def make_tokenizer(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_sentences(50, seed=1), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    assert len(fast) == vocab_size
    fast.save_pretrained(folder)
    return fast


def make_teacher(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of 4 layers with the tokenizer, saved as a Hugging Face folder."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY_ROWS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.08,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


ENTRIES, SPECIAL, ROWS = 320, 3, 352  # in Qwen2.5: 151,643, 22 and 151,936


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


CHATML = (
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
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


OURS: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
"""The architectures of our own model."""


def move_norms(model: torch.nn.Module) -> None:
    """Move norms and biases away from 1 and 0, where they would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)


def make_model(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model of 3 layers that ours can be, with tokenizer; a qwen3's heads are 12 wide."""
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
        **({"head_dim": 12} if kind == "qwen3" else {}),
        **changes,
    }
    make_config, make = OURS[kind]
    model = make(make_config(**{"tie_word_embeddings": kind != "llama", **shape}))
    move_norms(model)
    model.save_pretrained(folder)
    make_qwen_tokenizer(folder)
    return folder


BLOCKS_OF_32: dict[str, Any] = {
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


def make_sentencepiece_tokenizer(folder: Path, *, prefix: bool = False, **changes: Any) -> None:
    """BPE with byte fallback as transformers makes it of SentencePiece's: Gemma's, or Llama 2's."""
    replace = normalizers.Replace(" ", "\u2581")
    learned = Tokenizer(models.BPE())
    learned.normalizer = replace
    learned.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=88, show_progress=False)
    learned.train_from_iterator(make_sentences(80, seed=1), trainer)
    pieces = [learned.id_to_token(number) for number in range(learned.get_vocab_size())]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *pieces]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(token[:cut], token[cut:]) for token in pieces for cut in range(1, len(token))]
    merges = [pair for pair in pairs if vocabulary.keys() >= set(pair)]
    model = models.BPE(
        vocabulary,
        changes.get("merges", lambda rules: rules)(merges),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = changes.get("normalizer", replace)
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    tokenizer.decoder = DecoderSequence(
        [ReplaceDecoder("\u2581", " "), ByteFallbackDecoder(), FuseDecoder()]
    )
    added = ("<tool>", "\u2581\u2581\u2581")
    tokenizer.add_tokens([AddedToken(token, normalized=not prefix) for token in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def make_other(folder: Path, kind: str, **changes: Any) -> Path:
    """A random model that transformers runs, with a tokenizer as Qwen2.5's."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        **BLOCKS_OF_32,
        "vocab_size": ROWS,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": ENTRIES + SPECIAL - 1,
        "pad_token_id": None,
        **changes,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    move_norms(model)
    model.save_pretrained(folder)
    make_qwen_tokenizer(folder)
    return folder


def make_llama(folder: Path, **changes: Any) -> Path:
    make_model(folder, "llama", **(BLOCKS_OF_32 | changes))
    make_digit_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


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


DECODER = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def hugging_face(kind: str, tied: bool, **changes: Any) -> torch.nn.Module:
    """A random model; its heads are 8 wide, in a qwen3 12, so that they exceed hidden_size."""
    make_config, make = OURS[kind]
    shape = DECODER | ({"head_dim": 12} if kind == "qwen3" else {}) | changes
    model: torch.nn.Module = make(make_config(**shape, tie_word_embeddings=tied))
    move_norms(model)
    return model.eval()


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, **changes}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


SMALL_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}


def make_qwen3(folder: Path, *, rows: int = 320, seed: int = 5) -> Path:
    """A random Qwen3 with the corpus's tokenizer."""
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**SMALL_SHAPE, vocab_size=rows, head_dim=16)).save_pretrained(
        folder
    )
    make_tokenizer(folder)
    return folder


def make_mistral(folder: Path, *, rows: int = 320, seed: int = 5) -> Path:
    """A random model that only transformers runs, with the corpus's tokenizer."""
    torch.manual_seed(seed)
    config = MistralConfig(**SMALL_SHAPE, vocab_size=rows, head_dim=16, sliding_window=24)
    MistralForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_gpt_oss(folder: Path) -> Path:
    """A random gpt-oss whose weights are not quantised, with the corpus's tokenizer."""
    torch.manual_seed(6)
    config = GptOssConfig(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=0,
    )
    GptOssForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def small_shape(**changes: Any) -> tuple[Shape, StudentModel]:
    """The small student of the tests, as a shape and as a model."""
    config = ModelConfig(**{**SMALL, "max_seq_len": 32, **changes})
    values = vars(config) | {"num_hidden_layers": config.num_layers}
    shape = Shape(
        hidden_size=values["hidden_size"],
        num_layers=values["num_layers"],
        num_heads=values["num_heads"],
        num_kv_heads=values["num_kv_heads"],
        head_size=config.head_size,
        intermediate_size=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        tied=values["tie_embeddings"],
        qkv_bias=values["attention_bias"],
        qk_norm=values["qk_norm"],
    )
    return shape, StudentModel(config)
