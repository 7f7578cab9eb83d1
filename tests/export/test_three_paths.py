"""Three paths on small models, in each format and RoPE variant; and that damage is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline.config.delivery_params import ExportParams
from pipeline.errors import DecantError, ParamsError
from pipeline.export import check as check_module
from pipeline.export import gguf_models, gguf_vocabulary
from pipeline.export.check import (
    WITHOUT_LLAMA_CPP,
    Reference,
    check_export,
    cut_prompts,
    follow,
    judge,
    make_reference,
    normalised,
)
from pipeline.export.check_result import ExportCheck
from pipeline.export.llama_cpp import LlamaCpp, has_llama_cpp
from pipeline.export.to_gguf import write_gguf
from pipeline.export.to_huggingface import write_huggingface
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.tokenizer import load_tokenizer
from pipeline.model.weights import save_student
from pipeline.runtime.device import DTYPES
from tests.models import (
    LLAMA3,
    ROWS,
    make_llama,
    make_other,
    make_qwen_tokenizer,
    make_sentencepiece_tokenizer,
    move_norms,
    text_of_many_lines,
    yarn,
)


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


needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="needs the package xllamacpp")


def export_and_check(source: Path, folder: Path, params: ExportParams) -> ExportCheck:
    folder.mkdir()
    write_huggingface(source, folder, DTYPES[params.dtype])
    files = {kind: folder / f"x-{kind}.gguf" for kind in params.gguf}
    for kind, file in files.items():
        write_gguf(folder, file, kind, name="x")
    return check_export("x", source, folder, files, text_of_many_lines(), params)


FOLDERS = {"qwen2": "qwen_folder", "qwen3": "qwen3_folder", "llama": "llama_folder"}


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_three_paths_say_the_same(
    architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(FOLDERS[architecture])
    check = export_and_check(source, tmp_path / "x", export_params())
    paths = {path.name: path for path in check.paths}
    assert list(paths) == [
        "transformers, float32",
        *(f"llama.cpp, {kind}" for kind in ("f32", "f16", "bf16", "q8_0")),
    ]
    assert check.passed
    assert not check.left_out
    for name in ("transformers, float32", "llama.cpp, f32"):
        assert (paths[name].equal_tokens, paths[name].equal_prompts) == (40, 5)
    assert all(path.tokens == 40 for path in check.paths)
    assert [path.required for path in check.paths] == [True, True, True, False, False]
    prompts = cut_prompts(text_of_many_lines(), load_tokenizer(source), export_params())
    said = make_reference(source, tmp_path / "x", prompts, export_params()).tokens
    assert len({token for tokens in said for token in tokens}) > 6  # not one token for ever
    lines = len([line for line in text_of_many_lines().splitlines() if line.strip()])
    assert lines > 40
    assert [(t.name, t.lines, t.equal_lines) for t in check.tokenizers] == [
        ("transformers", 40, 40),
        ("llama.cpp", 40, 40),
    ]


@needs_llama_cpp
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0},
        yarn(original_max_position_embeddings=32, factor=4.0),
        LLAMA3,
    ],
    ids=["linear", "yarn", "llama3"],
)
def test_stretched_rotations_are_llama_cpps(rope: dict[str, Any], tmp_path: Path) -> None:
    source = make_llama(tmp_path / "model", rope_parameters=rope)
    params = export_params(gguf=("f32",), prompt_tokens=40, max_new_tokens=12, lines=1)
    check = export_and_check(source, tmp_path / "x", params)
    assert [path.equal_tokens for path in check.paths] == [60, 60]


GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3, yarn": ("qwen3", {"rope_parameters": yarn(original_max_position_embeddings=32)}),
    "mistral": ("mistral", {"head_dim": 24, "sliding_window": None}),
    "phi3": ("phi3", {}),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,  # llama.cpp's shortest context
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 24,
            "query_pre_attn_scalar": 40,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": GEMMA_ROPE,
        },
    ),
    "gemma3, all sliding": ("gemma3_text", {"head_dim": 16, "sliding_window": 8}),
    "gemma3, all full": ("gemma3_text", {"layer_types": ["full_attention"] * 2, "head_dim": 16}),
}


@needs_llama_cpp
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_llama_cpps(name: str, tmp_path: Path) -> None:
    kind, changes = OTHERS[name]
    source = make_other(tmp_path / "model", kind, **changes)
    params = export_params(gguf=("f32",), prompts=4, prompt_tokens=40, max_new_tokens=12, lines=5)
    check = export_and_check(source, tmp_path / "x", params)
    assert [path.equal_tokens for path in check.paths] == [48, 48]
    assert check.passed


@needs_llama_cpp
@pytest.mark.parametrize(("bias", "qk_norm"), [(False, False), (False, True), (True, True)])
def test_students_with_wide_heads_are_llama_cpps(bias: bool, qk_norm: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24}
    sizes = {"intermediate_size": 96, "vocab_size": ROWS, "max_seq_len": 64}
    config = ModelConfig(**shape, **sizes, attention_bias=bias, qk_norm=qk_norm)
    student = StudentModel(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)
    move_norms(student)
    make_qwen_tokenizer(tmp_path / "tokenizer")
    save_student(student, tmp_path / "model", tokenizer_from=tmp_path / "tokenizer")
    params = export_params(gguf=("f32",), lines=5)
    check = export_and_check(tmp_path / "model", tmp_path / "x", params)
    assert [path.equal_tokens for path in check.paths] == [40, 40]


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [False, True], ids=["gemma", "llama2"])
def test_sentencepiece_tokenizers_are_llama_cpps(prefix: bool, tmp_path: Path) -> None:
    source = make_other(tmp_path / "model", "mistral", sliding_window=None)
    make_sentencepiece_tokenizer(source, prefix=prefix)
    check = export_and_check(source, tmp_path / "x", export_params(gguf=("f32",), lines=500))
    assert [(t.name, t.lines - t.equal_lines) for t in check.tokenizers] == [
        ("transformers", 0),
        ("llama.cpp", 0),
    ]
    assert check.passed


@needs_llama_cpp
@pytest.mark.parametrize(
    ("steps", "whole_words"),
    [key for key in gguf_vocabulary._PRE_TOKENIZERS if key[0][0][0] == "Split"],
    ids=lambda key: None if isinstance(key, tuple) else str(key),
)
def test_ways_to_split_text_are_llama_cpps(
    steps: tuple[tuple[str, str], ...], whole_words: bool, qwen_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(qwen_folder, tmp_path / "model")
    content = json.loads((source / "tokenizer.json").read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"] = {"Regex": steps[0][1]}
    content["model"]["ignore_merges"] = whole_words
    (source / "tokenizer.json").write_text(json.dumps(content))
    write_gguf(source, tmp_path / "x.gguf", "f16", name="x")
    tokenizer = load_tokenizer(source)
    lines = [
        *text_of_many_lines().splitlines(),
        "camelCase HTTPServer2 don'T I'LL 1234567 a/b//\n/",
    ]
    with LlamaCpp(tmp_path / "x.gguf", context=32) as llama:
        for line in normalised(tokenizer, lines):
            ids = tokenizer(line, add_special_tokens=False)["input_ids"]
            assert llama.tokenize(line) == ids, line


@needs_llama_cpp
def test_rows_in_the_wrong_order_are_found(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_models, "interleave_halves", lambda rows, heads: rows)
    check = export_and_check(llama_folder, tmp_path / "x", export_params(gguf=("f16",)))
    assert not check.passed
    assert [path.passed for path in check.paths] == [True, False]


@needs_llama_cpp
def test_text_split_in_another_way_is_found(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(llama_folder, tmp_path / "model")
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary_, merges = content["model"]["vocab"], content["model"]["merges"]
    vocabulary_["37"] = vocabulary_.pop("".join(merges.pop()))  # in place of the rarest
    merges.append(["3", "7"])  # which is never used, since each digit stands alone
    (source / "tokenizer.json").write_text(json.dumps(content))
    params = export_params(gguf=("f16",), lines=500)
    assert export_and_check(source, tmp_path / "right", params).passed
    monkeypatch.setattr(gguf_vocabulary, "pre_tokenizer_name", lambda state, folder: "gpt-2")
    check = export_and_check(source, tmp_path / "x", params)
    theirs = check.tokenizers[1]
    assert theirs.equal_lines < theirs.lines
    assert not check.passed
    assert all(path.passed for path in check.paths)  # these get ids


@needs_llama_cpp
def test_damaged_file_is_one_sentence(llama_folder: Path, tmp_path: Path) -> None:
    write_gguf(llama_folder, tmp_path / "x.gguf", "f16", name="x")
    data = (tmp_path / "x.gguf").read_bytes()
    for damaged in (data[: len(data) // 2], b"GARB" + data[4:]):
        (tmp_path / "x.gguf").write_bytes(damaged)
        with pytest.raises(DecantError, match=r"llama\.cpp does not load .*x\.gguf") as caught:
            LlamaCpp(tmp_path / "x.gguf", context=32)
        assert "\n" not in str(caught.value)


@needs_llama_cpp
def test_server_goes_with_its_owner(llama_folder: Path, tmp_path: Path) -> None:
    write_gguf(llama_folder, tmp_path / "x.gguf", "f16", name="x")
    with LlamaCpp(tmp_path / "x.gguf", context=32) as llama:
        assert len(llama.generate([[5, 6]], 3)[0]) <= 3
        process = llama._process
        with pytest.raises(DecantError, match=r"llama\.cpp failed on .*x\.gguf"):
            llama.generate([[5] * 600], 3)  # beyond its context
        assert process.poll() is None
    assert process.poll() is not None


def test_without_llama_cpp_the_path_is_left_out_by_name(
    qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "has_llama_cpp", lambda: False)
    check = export_and_check(qwen_folder, tmp_path / "x", export_params(gguf=("f16",)))
    assert [path.name for path in check.paths] == ["transformers, float32"]
    assert check.left_out == [WITHOUT_LLAMA_CPP]
    assert check.passed
    content = asdict(check)
    assert content["paths"][0] == {
        "name": "transformers, float32",
        "tokens": 40,
        "equal_tokens": 40,
        "near_ties": 0,
        "equal_prompts": 5,
        "required": True,
        "passed": True,
    }
    assert content["tokenizers"][0] == {
        "name": "transformers",
        "lines": 40,
        "equal_lines": 40,
        "passed": True,
    }
    assert (content["model"], content["prompts"], content["new_tokens"]) == ("x", 5, 8)


def make_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=352, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_qwen_tokenizer(folder)
    return folder


def test_other_architectures_are_compared_with_what_they_were(tmp_path: Path) -> None:
    source, params = make_gpt2(tmp_path / "model"), export_params(gguf=())
    check = export_and_check(source, tmp_path / "x", params)
    assert check.passed
    assert check.reference == "transformers, float32, before the export"
    assert check.paths[0].equal_tokens == 40
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.0.attn.c_attn.weight"].mul_(1.5)
    save_file(tensors, file, metadata={"format": "pt"})
    check = check_export("x", source, tmp_path / "x", {}, text_of_many_lines(), params)
    assert not check.passed


def test_a_changed_tokenizer_is_found(qwen_folder: Path, tmp_path: Path) -> None:
    params = export_params(gguf=())
    export_and_check(qwen_folder, tmp_path / "x", params)
    shutil.copytree(qwen_folder, tmp_path / "other")
    make_qwen_tokenizer(tmp_path / "other")
    content = (tmp_path / "other" / "tokenizer.json").read_text()
    first = content.index('"merges": [') + len('"merges": [')
    end = content.index("],", first) + 2  # without its first rule
    (tmp_path / "other" / "tokenizer.json").write_text(content[:first] + content[end:])
    check = check_export("x", tmp_path / "other", tmp_path / "x", {}, text_of_many_lines(), params)
    assert not check.tokenizers[0].passed
    assert not check.passed


def scripted(answers: dict[tuple[int, ...], list[int]]) -> Any:
    def generate(texts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        return [answers[tuple(text)][:new_tokens] for text in texts]

    return generate


def flat_logits(ids: Sequence[int]) -> Tensor:
    """Token 5 leads by 0.02 over 6, by 0.3 over 7."""
    logits = torch.full((10,), -9.0)
    logits[5:8] = torch.tensor([1.0, 0.98, 0.7])
    return logits


def test_a_path_is_led_along_the_reference() -> None:
    reference = Reference("r", [[1], [2]], [[5, 5, 5], [5, 5, 5]], flat_logits)
    # the first differs at once and goes on behind 5; the second ends early and is asked again
    path = scripted({(1,): [6, 0, 0], (1, 5): [5, 7], (2,): [5], (2, 5): [5, 5]})
    chosen = follow(path, reference)
    assert chosen == [[6, 5, 7], [5, 5, 5]]
    loose = judge("p", chosen, reference, None, export_params(min_agreement=0.6))
    assert (loose.tokens, loose.equal_tokens, loose.equal_prompts) == (6, 4, 1)
    assert (loose.required, loose.passed, loose.near_ties) == (False, True, 0)
    assert not judge("p", chosen, reference, None, export_params(min_agreement=0.7)).passed
    strict = judge("p", chosen, reference, 0.05, export_params())
    assert (strict.near_ties, strict.required, strict.passed) == (1, True, False)
    assert judge("p", chosen, reference, 0.31, export_params()).passed
    few = judge("p", chosen, reference, 0.31, export_params(min_agreement=0.7))
    assert (few.equal_tokens, few.near_ties, few.passed) == (4, 2, False)  # of 6


def test_prompts_start_at_lines_all_over_the_text(qwen_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
    lines = [f"line {n} of the text" for n in range(100)]
    prompts = cut_prompts("\n".join(lines), tokenizer, export_params(prompts=4, prompt_tokens=6))
    starts = [tokenizer.decode(ids) for ids in prompts]
    assert all(len(ids) == 6 for ids in prompts)
    assert all(text.startswith("line ") for text in starts)
    assert starts[0].startswith("line 0")
    assert len(set(starts)) == 4
    with pytest.raises(DecantError, match="has 1 characters, too few for 4 prompts"):
        cut_prompts("\n", tokenizer, export_params(prompts=4))


def test_prompts_beyond_the_context_are_refused(qwen_folder: Path, tmp_path: Path) -> None:
    params = export_params(gguf=(), prompt_tokens=50, max_new_tokens=20)
    with pytest.raises(
        ParamsError, match=r"export\.max_new_tokens=20 exceed the model's context of 64"
    ):
        export_and_check(qwen_folder, tmp_path / "x", params)
