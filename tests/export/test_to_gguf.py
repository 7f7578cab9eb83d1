"""Every tensor and field of a GGUF file against the folder it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipeline.errors import DecantError
from pipeline.export.gguf_models import interleave_halves, require_convertible
from pipeline.export.gguf_vocabulary import pre_tokenizer_name
from pipeline.export.to_gguf import write_gguf
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.weights import save_student, stream_tensors
from tests.models import (
    BLOCKS_OF_32,
    LLAMA3,
    edit_json,
    make_digit_tokenizer,
    make_llama,
    make_model,
    make_qwen_tokenizer,
    make_sentencepiece_tokenizer,
    make_tokenizer,
    yarn,
)

FOLDERS = {"qwen2": "qwen_folder", "qwen3": "qwen3_folder", "llama": "llama_folder"}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, *middle, last = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(middle)]}.{last}"


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Fields; tensors as numbers; the format that each is stored in."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors, formats = {}, {}
    for t in reader.tensors:
        numbers = np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32)
        tensors[t.name] = torch.from_numpy(numbers).reshape([int(n) for n in reversed(t.shape)])
        formats[t.name] = t.tensor_type.name.lower()
    return fields, tensors, formats


def in_neighbours(rows: Tensor, heads: int) -> Tensor:
    """Row 2 i of a head is its dimension i, row 2 i + 1 is dimension i + E / 2."""
    size = len(rows) // heads
    order = [
        h * size + i + half
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, size // 2)
    ]
    return rows[order]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_every_tensor_comes_back(
    architecture: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(FOLDERS[architecture])
    write_gguf(folder, tmp_path / "x.gguf", kind, name="x")
    _, found, formats = read(tmp_path / "x.gguf")
    wanted = dict(stream_tensors(folder))
    if architecture != "llama":
        wanted.pop("lm_head.weight", None)  # tied
    assert found.keys() == {gguf_name(name) for name in wanted}
    for name, tensor in wanted.items():
        heads = 4 if "q_proj" in name else 2
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = in_neighbours(tensor, heads)
        ours, stored_as = found[gguf_name(name)], kind if tensor.ndim == 2 else "f32"
        assert formats[gguf_name(name)] == stored_as, name
        if stored_as == "q8_0":
            scale = tensor.view(-1, 32).abs().amax(1, keepdim=True) / 127
            # half a step, and the scale's own rounding to float16 of up to 127 steps
            bound = scale * (0.5 + 127 * 2**-11 + 1e-4)
            assert ((ours - tensor).view(-1, 32).abs() <= bound).all(), name
            assert not torch.equal(ours, tensor)
        else:
            dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[stored_as]
            assert torch.equal(ours, tensor.to(dtype).float()), name


def test_rows_of_no_whole_blocks_stay_float16(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen2", **(BLOCKS_OF_32 | {"intermediate_size": 80}))
    write_gguf(folder, tmp_path / "x.gguf", "q8_0", name="x")
    _, _, formats = read(tmp_path / "x.gguf")
    assert formats["blk.0.ffn_down.weight"] == "f16"  # rows of 80
    assert formats["blk.0.ffn_up.weight"] == "q8_0"  # rows of 64


def test_halves_become_neighbours_by_hand() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of size 4
    assert interleave_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_metadata_and_tokenizer(qwen_folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    write_gguf(qwen_folder, tmp_path / "q.gguf", "f16", name="a name", license_id="mit")
    fields, _, _ = read(tmp_path / "q.gguf")
    expected = {
        "general.architecture": "qwen2",
        "general.name": "a name",
        "general.license": "mit",
        "general.file_type": 1,
        "qwen2.context_length": 64,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 96,
        "qwen2.block_count": 2,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 10000.0,
        "qwen2.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 322,
        "tokenizer.ggml.padding_token_id": 320,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["qwen2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:323] == tokenizer.convert_ids_to_tokens(range(323))
    assert kinds == [1] * 320 + [3] * 3 + [5] * 29  # normal, control, unused: 352 rows
    merges = json.loads((qwen_folder / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]

    write_gguf(llama_folder, tmp_path / "l.gguf", "bf16", name="x")
    fields, _, _ = read(tmp_path / "l.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.token_type"][310] == 4  # <tool>, user-defined
    assert "tokenizer.chat_template" not in fields
    assert "general.license" not in fields


def test_bos_is_put_before_a_text_only_where_the_tokenizer_does(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit_json(folder / "tokenizer_config.json", bos_token="<|endoftext|>")
    write_gguf(folder, tmp_path / "x.gguf", "f16", name="x")
    fields, _, _ = read(tmp_path / "x.gguf")
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.bos_token_id"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name for among gpt-2, smollm"),
        ({"pre_tokenizer": None}, "no name for"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "no name for"),
        ({"model": {"type": "Unigram"}}, "is Unigram"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ({"model": {"type": "BPE", "ignore_merges": True}}, "no name for"),
    ],
)
def test_other_tokenizers_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    state = {
        "model": {"type": "BPE"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    }
    assert pre_tokenizer_name(state, Path("m")) == "gpt-2"
    with pytest.raises(DecantError, match=message):
        pre_tokenizer_name(state | changes, Path("m"))


def with_one_rule_later(rules: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first of several rules for one token stands at the end."""
    unions = ["".join(rule) for rule in rules]
    place = next(place for place, union in enumerate(unions) if unions[place + 1] == union)
    return [*rules[:place], *rules[place + 1 :], rules[place]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": normalizers.Lowercase()}, "treats spaces in a way that llama.cpp does not"),
        ({"merges": lambda rules: rules[1:]}, "no rule merges"),
        ({"merges": with_one_rule_later}, "do not stand together"),
    ],
)
def test_rules_that_scores_cannot_express_are_refused(
    changes: dict[str, Any], message: str, llama_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    make_sentencepiece_tokenizer(folder, **changes)
    with pytest.raises(DecantError, match=message) as caught:
        write_gguf(folder, tmp_path / "x.gguf", "f16", name="x")
    assert "\n" not in str(caught.value)


def test_a_token_looked_for_after_the_first_space_is_refused(
    llama_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    make_sentencepiece_tokenizer(folder, prefix=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["normalized"] = True
    edit_json(folder / "tokenizer.json", added_tokens=content["added_tokens"])
    with pytest.raises(DecantError, match="after a space was put in front"):
        write_gguf(folder, tmp_path / "x.gguf", "f16", name="x")


def test_scores_fall_in_the_order_of_the_rules(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    make_sentencepiece_tokenizer(folder)
    write_gguf(folder, tmp_path / "x.gguf", "f16", name="x")
    fields, _, _ = read(tmp_path / "x.gguf")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    unions = list(dict.fromkeys("".join(rule) for rule in model["merges"]))
    assert [scores[union] for union in unions] == [-float(place) for place in range(len(unions))]
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    by_token = dict(zip(tokens, kinds, strict=True))
    assert [by_token[token] for token in ("<unk>", "<0x0A>", "<tool>", "   ")] == [3, 6, 4, 4]


def test_names_of_known_tokenizers(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a")
    make_qwen_tokenizer(tmp_path / "b", normalizer=normalizers.NFC())
    for name, expected in (("a", "gpt-2"), ("b", "qwen2")):
        state = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert pre_tokenizer_name(state, tmp_path) == expected
    regex = state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex.replace(
        r"\p{N}|", r"\p{N}{1,3}|", 1
    )
    state["model"]["ignore_merges"] = True
    assert pre_tokenizer_name(state, tmp_path) == "llama-bpe"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"rope_parameters": yarn(attention_factor=1.5)}, "attention_factor"),
        ("llama", {"rope_parameters": yarn(truncate=False)}, "truncate"),
        ("llama", {"rope_parameters": yarn(beta_fast=16.0)}, "beta"),
        ("qwen2", {"rope_parameters": LLAMA3}, "'llama3', which llama.cpp has for llama alone"),
        ("qwen3", {"rope_parameters": LLAMA3}, "'llama3', which llama.cpp has for llama alone"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen2", {"head_dim": 24}, "a qwen2 model with head_dim=24, and llama.cpp supports .* 16"),
    ],
)
def test_variants_that_llama_cpp_computes_otherwise_are_refused(
    kind: str,
    changes: dict[str, Any],
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    shutil.copytree(request.getfixturevalue(FOLDERS[kind]), tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **changes)
    with pytest.raises(DecantError, match=message) as caught:
        write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f16", name="x")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=320)).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(DecantError, match="holds a 'gpt2' model, and Decant writes qwen2, qwen3"):
        require_convertible(tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"hidden_act": "gelu"}, "hidden_act='gelu', and llama.cpp supports 'silu'"),
        ("mistral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
            r"full attention in the layers \[0, 1\], .* choose student\.layers accordingly",
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": yarn(original_max_position_embeddings=8),
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            "rope types 'yarn' and 'default'",
        ),
    ],
)
def test_variants_of_transformers_that_llama_cpp_lacks_are_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shape = BLOCKS_OF_32 | {"num_hidden_layers": 3, "vocab_size": 320, "pad_token_id": 0}
    AutoConfig.for_model(kind, **(shape | changes)).save_pretrained(tmp_path)
    with pytest.raises(DecantError, match=message) as caught:
        require_convertible(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("layers", "scored"), [(2, 24), (62, 16)])
def test_queries_of_gemma_make_up_for_llama_cpps_scale(
    layers: int, scored: int, tmp_path: Path
) -> None:
    """62 layers are Gemma 3 27B to llama.cpp, which then scales by hidden_size / heads = 16."""
    shape = BLOCKS_OF_32 | {"num_hidden_layers": layers, "vocab_size": 320, "pad_token_id": 0}
    config = AutoConfig.for_model("gemma3_text", **shape, head_dim=24, query_pre_attn_scalar=40)
    config.save_pretrained(tmp_path)
    assert require_convertible(tmp_path).query_scale == pytest.approx((scored / 40) ** 0.5)


def test_a_context_ends_with_the_window_that_llama_cpp_lacks(tmp_path: Path) -> None:
    shape = BLOCKS_OF_32 | {"max_position_embeddings": 64, "vocab_size": 320, "pad_token_id": 0}
    for kind in ("mistral", "phi3"):
        AutoConfig.for_model(kind, **shape, sliding_window=24).save_pretrained(tmp_path)
        assert require_convertible(tmp_path).metadata["context_length"] == 24


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", vocab_size=308)
    with pytest.raises(DecantError, match="gives id 309, but the model has 308 embedding rows"):
        write_gguf(folder, tmp_path / "x.gguf", "f16", name="x")
    assert not list(tmp_path.glob(".*partial"))


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    """As Gemma 3's <image_soft_token> of its text models: <tool> has id 310."""
    folder = make_llama(tmp_path / "model", vocab_size=310)
    write_gguf(folder, tmp_path / "x.gguf", "f16", name="x")
    values, _, _ = read(tmp_path / "x.gguf")
    assert len(values["tokenizer.ggml.tokens"]) == 310
    assert "<tool>" not in values["tokenizer.ggml.tokens"]


def test_the_pre_tokenizer_is_tokenizer_jsons_beside_any_model(tmp_path: Path) -> None:
    """A student with a bias is a qwen2 in a GGUF file, and its tokenizer is the corpus's."""
    make_digit_tokenizer(tmp_path / "digits")
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
    student = StudentModel(ModelConfig(**shape, intermediate_size=64, vocab_size=320))
    save_student(student, tmp_path / "model", tokenizer_from=tmp_path / "digits")
    write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f16", name="x")
    values, tensors, _ = read(tmp_path / "x.gguf")
    assert values["general.architecture"] == "qwen2"
    assert values["tokenizer.ggml.pre"] == "smollm"
    assert "blk.0.attn_q.bias" in tensors
    assert "blk.0.attn_output.bias" not in tensors


def test_weights_beyond_float16_are_refused_and_an_older_file_stays(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"older")
    real = list(stream_tensors(llama_folder))
    large = [(n, t * 1e6 if n == "lm_head.weight" else t) for n, t in real]
    monkeypatch.setattr("pipeline.export.to_gguf.stream_tensors", lambda folder: iter(large))
    with pytest.raises(DecantError, match=r"output\.weight holds .* beyond float16's 65504"):
        write_gguf(llama_folder, file, "f16", name="x")
    assert file.read_bytes() == b"older"
    assert [f.name for f in tmp_path.iterdir()] == ["x.gguf"]
    write_gguf(llama_folder, file, "bf16", name="x")  # which it fits into
    assert read(file)[1]["output.weight"].abs().max() > 65504
