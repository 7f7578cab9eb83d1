"""What a teacher would compute otherwise than its own model does is refused when it is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MambaConfig,
    ModernBertDecoderConfig,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    xLSTMConfig,
)

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import DecantError
from pipeline.model import logit_transform
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.run import run_training
from tests.helpers import SMALL, capture_all, change
from tests.models import make_teacher, make_tokenizer

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}


def open_teacher(folder: Path, dtype: torch.dtype = torch.float32) -> HuggingFaceTeacher:
    return HuggingFaceTeacher(folder, vocab_size=300, dtype=dtype, device=torch.device("cpu"))


RECURRENT_GEMMA = RecurrentGemmaConfig(
    **BASE, num_key_value_heads=1, lru_width=64, attention_window_size=16
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "where"),
    [
        (RECURRENT_GEMMA, "after the head"),  # a cap, whose name this test makes unknown
        (
            ModernBertDecoderConfig(
                **BASE,
                max_position_embeddings=256,
                local_attention=16,
                global_attn_every_n_layers=3,
                cls_token_id=1,
                sep_token_id=2,
            ),
            "before the head",  # a dense layer and a norm
        ),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_model_with_more_between_body_and_logits_is_refused(
    config: Any, where: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_transform, "_SOFT_CAPS", ())
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = f"a '{config.model_type}' model does more {where}, which Decant does not support"
    with pytest.raises(DecantError, match=message):
        open_teacher(tmp_path, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [RECURRENT_GEMMA, MambaConfig(**BASE, state_size=4)],  # a cap; float32 states, rounded later
    ids=lambda config: config.model_type,
)
def test_rounding_is_no_difference(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert open_teacher(tmp_path, dtype).dtype == dtype


def test_a_model_that_its_dtype_breaks_is_one_sentence(tmp_path: Path) -> None:
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}
    config = xLSTMConfig(**shape, chunk_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        DecantError, match=r"cannot be run in bfloat16 .*: try float32, or download"
    ):
        open_teacher(tmp_path, torch.bfloat16)


def test_rows_longer_than_the_teachers_positions_are_refused(
    tiny_params: Params, tmp_path: Path
) -> None:
    shape = {"vocab_size": 320, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    AutoModelForCausalLM.from_config(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    make_tokenizer(tmp_path / "gpt2")
    make_teacher(tmp_path / "llama", max_position_embeddings=64)
    for kind in ("gpt2", "llama"):
        params = change(
            tiny_params,
            paths={
                "teacher": str(tmp_path / kind),
                "corpus": str(tmp_path / kind / "corpus.zarr"),
                "logits": str(tmp_path / kind / "logits"),
            },
            corpus={"row_length": 65},
            prepare={"document_mask": False},
        )
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
        message = r"rows of 65 tokens are longer than the 64 positions of the teacher .*row_length"
        with pytest.raises(DecantError, match=message):
            capture_all(params)


def test_yarn_reads_further_than_its_config_was_trained_on(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    folder = make_teacher(tmp_path, max_position_embeddings=64, rope_parameters=rope)
    assert open_teacher(folder).max_seq_len == 256


def test_ids_without_a_row_are_no_matter_where_the_corpus_holds_none(
    tiny_params: Params, tmp_path: Path
) -> None:
    """Gemma 3's text models have a tokenizer with <image_soft_token>, but no row for it."""
    folder = make_teacher(tmp_path / "teacher", vocab_size=300)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<image>", special=False)])
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<image>") == 300
    params = change(
        tiny_params,
        paths={"teacher": str(folder)},
        student=SMALL | {"init": "random", "vocab_size": 300},
    )
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert CorpusSplit(params.paths.corpus, "train").info.vocab_size == 300
    capture_all(params)
    run_training(params, "student")
    text = tmp_path / "image.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"the cat {n} sees <image>"}) for n in range(99)))
    files = {"files": {"paths": [str(text)], "column": "text"}}
    params = change(params, corpus=files, paths={"corpus": str(tmp_path / "other.zarr")})
    with pytest.raises(DecantError, match=r"holds id 300 \('<image>'\), and .* has 300 embedding"):
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)


def test_a_teacher_larger_than_the_device_is_one_sentence(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("pipeline.teacher.transformers.place_rounded", full)
    with pytest.raises(DecantError, match="does not fit into the memory of cpu in float32: divide"):
        open_teacher(teacher_folder)
