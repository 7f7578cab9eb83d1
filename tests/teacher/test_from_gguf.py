"""A GGUF teacher is the model that the file holds, or is refused by what it holds."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from pipeline.errors import DecantError
from pipeline.export.to_gguf import write_gguf
from pipeline.model.tokenizer import load_tokenizer
from pipeline.teacher.from_gguf import dequantise
from tests.models import (
    make_digit_tokenizer,
    make_llama,
    make_model,
    make_teacher,
    text_of_many_lines,
)

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    *(
        {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            **LLAMA3,
        }
        for theta, factor, original in ((5e5, 8.0, 64), (5e5, 32.0, 8192), (1e4, 2.0, 32))
    ),
]


def from_gguf(file: Path, folder: Path) -> Path:
    folder.mkdir()
    dequantise(file, None, folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: rope["rope_type"])
def test_positions_are_scaled_as_the_file_says(
    kind: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    if kind != "llama" and rope["rope_type"] == "llama3":
        return  # llama.cpp has it for llama alone
    shape = {"rope_parameters": rope, "max_position_embeddings": 256}
    folder = make_model(tmp_path / "model", kind, **shape)
    write_gguf(folder, tmp_path / "x.gguf", "f32", name="x")
    back = from_gguf(tmp_path / "x.gguf", tmp_path / "back")
    tokens = torch.randint(0, 300, (1, 200))
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, back)]
    logits = [model(tokens).logits.log_softmax(-1) for model in models]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=1e-3)
    if rope.get("original_max_position_embeddings") != 8192 and rope["rope_type"] == "llama3":
        return  # no pair of so small a head tells the original context from its neighbours
    assert models[1].config.rope_parameters == models[0].config.rope_parameters


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a GGUF file with other metadata; "_" in a keyword is "." in the key."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    values = {key.replace("__", "."): value for key, value in changes.items()}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in values:
            continue
        kind, *inner = field.types
        writer.add_key_value(key, field.contents(), kind, inner[-1] if inner else None)
    kinds = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}
    for key, value in values.items():
        if value is not None:
            kind = kinds.get(type(value), gguf.GGUFValueType.UINT32)
            writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_qwen3_without_the_width_of_its_heads_has_the_usual_one(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3", head_dim=8)  # 48 / 6
    write_gguf(folder, tmp_path / "x.gguf", "f32", name="x")
    file = rewritten(tmp_path / "x.gguf", tmp_path / "y.gguf", qwen3__attention__key_length=None)
    model = AutoModelForCausalLM.from_pretrained(from_gguf(file, tmp_path / "back"))
    assert model.config.head_dim == 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(make_llama(folder / "model"), folder / "x.gguf", "f32", name="x")
    return folder / "x.gguf"


def test_text_is_split_as_the_file_says(whole: Path, tmp_path: Path) -> None:
    back = from_gguf(rewritten(whole, tmp_path / "a.gguf"), tmp_path / "back")
    make_digit_tokenizer(tmp_path / "digits")
    text = text_of_many_lines()
    ids = load_tokenizer(back)(text, add_special_tokens=False)["input_ids"]
    wanted = Tokenizer.from_file(str(tmp_path / "digits/tokenizer.json"))
    assert ids == wanted.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer__ggml__pre": "of-tomorrow"}, r"splits text by 'of-tomorrow'"),
        ({"llama__rope__scaling__type": "longrope"}, "by rope type 'longrope'"),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 2.0},
            "'original_context_length': None",
        ),
        (
            {
                "llama__rope__scaling__type": "linear",
                "llama__rope__scaling__factor": 2.0,
                "llama__rope__scaling__attn_factor": 1.5,
            },
            r"'attn_factor': 1\.5",
        ),
        ({"llama__embedding_length": 2**31 - 1}, "says hidden_size="),
        ({"llama__block_count": 2**31 - 1}, r"numbers 2 at most"),
        ({"llama__block_count": "2"}, "says num_hidden_layers='2'"),
        ({"llama__feed_forward_length": 2**31}, "says intermediate_size="),
        ({"general__alignment": 0}, "aligns its weights to 0 bytes"),
    ],
)
def test_what_is_not_read_back_is_refused(
    changes: dict[str, Any], words: str, whole: Path, tmp_path: Path
) -> None:
    file = rewritten(whole, tmp_path / "x.gguf", **{k: v for k, v in changes.items() if v != 0})
    if changes.get("general__alignment") == 0:
        file = rewritten(whole, tmp_path / "y.gguf", general__alignment=32)
        data, key = file.read_bytes(), b"general.alignment" + struct.pack("<I", 4)
        file.write_bytes(data.replace(key + struct.pack("<I", 32), key + bytes(4)))
    with pytest.raises(DecantError, match=words) as caught:
        from_gguf(file, tmp_path / "back")
    assert "\n" not in str(caught.value)


def test_a_file_without_its_way_of_splitting_is_taken_with_a_word(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_gguf(rewritten(whole, tmp_path / "x.gguf", tokenizer__ggml__pre=None), tmp_path / "back")
    assert "does not say how its tokenizer splits text" in "".join(capsys.readouterr())


@pytest.mark.parametrize("place", [4, 8, 16])  # version, tensors, values
@pytest.mark.parametrize("count", [2**31, 2**63])
def test_absurd_counts_are_not_allocated_by(
    place: int, count: int, whole: Path, tmp_path: Path
) -> None:
    data = bytearray(whole.read_bytes())
    data[place : place + 8] = struct.pack("<Q", count)
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(DecantError, match="so that it is not a complete GGUF file"):
        from_gguf(tmp_path / "x.gguf", tmp_path / "back")


def test_flipped_bytes_are_one_sentence(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "model", hidden_size=32, num_hidden_layers=1)
    write_gguf(folder, tmp_path / "x.gguf", "q8_0", name="x")
    whole = (tmp_path / "x.gguf").read_bytes()
    header = whole.index(b"blk.0.ffn_up") + 60
    refused = 0
    for seed in range(40):
        generator = random.Random(seed)
        data = bytearray(whole)
        for _ in range(3):
            data[generator.randrange(header if seed % 4 else len(data))] ^= generator.randrange(
                1, 256
            )
        (tmp_path / "y.gguf").write_bytes(data if seed % 10 else data[: len(data) // 2])
        try:
            from_gguf(tmp_path / "y.gguf", tmp_path / "back")
        except DecantError as error:
            refused += "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(tmp_path / "back")
    assert refused > 10
