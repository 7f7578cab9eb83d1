"""The study of small random models: everything agrees, and what is broken is found out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.errors import DecantError, ParamsError
from pipeline.io.ownership import MARK
from pipeline.model.decoder import GQAAttention, RMSNorm, RotaryEmbedding, SwiGLUFFN
from pipeline.model.kv_cache import KVCache
from pipeline.study import PART_NAMES, components
from pipeline.study.architecture import module_tree
from pipeline.study.comparison import Part
from pipeline.study.speed import peak_bytes
from pipeline.study.study import PARTS, run_parts
from pipeline.study.study_report import describe_device
from pipeline.study.subject import Subject, locate
from tests.models import make_model, make_qwen_tokenizer
from tests.study.subjects import make_subject


def run_one(subject: Subject, part: str) -> Part:
    (section,) = run_parts(subject, [part])
    return section


def failed(part: Part) -> set[str]:
    return {comparison.name for comparison in part.failed}


def test_parts_have_the_names_that_the_stage_offers() -> None:
    assert tuple(PARTS) == PART_NAMES


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_all_comparisons_pass(kind: str, qwen_folder: Path, llama_folder: Path) -> None:
    subject = make_subject(qwen_folder if kind == "qwen2" else llama_folder)
    sections = list(run_parts(subject, list(PARTS)))
    assert [section.name for section in sections] == list(PARTS)
    for section in sections:
        assert not failed(section), section.title
        assert len(section.comparisons) == 0 if section.name == "speed" else section.comparisons
        for comparison in section.comparisons:  # a tolerance that cannot fail would say nothing
            assert comparison.limit < 1e-3


def test_all_comparisons_of_a_qwen3_pass(tmp_path: Path) -> None:
    subject = make_subject(make_model(tmp_path, "qwen3"))
    others = [name for name in PARTS if name not in ("speed", "tokenizer")]
    sections = {section.name: section for section in run_parts(subject, others)}
    assert not any(map(failed, sections.values()))
    assert [comparison.name for comparison in sections["rmsnorm"].comparisons] == [
        "input_layernorm",
        "q_norm",
        "k_norm",
        "post_attention_layernorm",
        "norm, on this layer's output",
    ]


def test_queries_that_are_not_normalised_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(make_model(tmp_path, "qwen3"))
    monkeypatch.setattr(subject.our_block.self_attn, "q_norm", torch.nn.Identity())
    assert failed(run_one(subject, "gqa")) >= {"Q, rotated, by head", "output of the fused kernel"}
    assert failed(run_one(subject, "layer")) == {"our block"}


def test_stretched_rope_passes_too(tmp_path: Path) -> None:
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    folder = make_model(tmp_path, "qwen2", rope_parameters=parameters)
    section = run_one(make_subject(folder), "rope")
    assert not failed(section)
    assert section.tables["Parameters"][1] == ("variant", "yarn", "yarn")


def mean_subtracted(norm: RMSNorm, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def test_a_norm_that_subtracts_the_mean_is_found(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)
    monkeypatch.setattr(RMSNorm, "forward", mean_subtracted)
    assert len(failed(run_one(subject, "rmsnorm"))) == 3
    assert failed(run_one(subject, "layer")) == {"our block"}
    assert "logits of the prompt" in failed(run_one(subject, "reference"))


def neighbours(self: RotaryEmbedding, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The other layout: pairs of neighbours."""
    angles = (positions[..., None].float() * self.inv_freq).repeat_interleave(2, -1)[:, None]
    return angles.cos(), angles.sin()


def test_rope_of_the_other_layout_is_found(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)
    monkeypatch.setattr(RotaryEmbedding, "forward", neighbours)
    assert failed(run_one(subject, "rope")) >= {"cos", "sin", "rotated queries"}


def test_a_slow_frequency_that_is_off_is_found(tmp_path: Path) -> None:
    """It is far below any absolute tolerance, and turns no cos within this context."""
    parameters = {"rope_type": "default", "rope_theta": 1e9}
    subject = make_subject(make_model(tmp_path, "qwen2", rope_parameters=parameters))
    assert not failed(run_one(subject, "rope"))
    subject.ours.model.rotary.inv_freq[-1] /= 4
    assert failed(run_one(subject, "rope")) == {"inverse frequencies, ours over theirs"}


def test_rotation_the_other_way_is_found(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)

    def backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos - torch.cat((-second, first), -1) * sin

    monkeypatch.setattr(components, "rotate", backwards)
    assert failed(run_one(subject, "rope")) == {"rotated queries"}
    assert failed(run_one(subject, "gqa")) >= {"Q, rotated, by head", "K, rotated, by head"}


def test_heads_shared_in_the_other_order_are_found(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)
    plain = components.attention_plain

    def tiled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return plain(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))

    monkeypatch.setattr(components, "attention_plain", tiled)
    names = failed(run_one(subject, "gqa"))
    assert names >= {"scores Q K^T / sqrt(E), causal part", "weights softmax(scores)", "output"}
    assert not names & {"Q", "K", "V"}


def test_gate_and_up_exchanged_are_found(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)
    forward: Callable[[SwiGLUFFN, Tensor], Tensor] = lambda self, x: self.down_proj(  # noqa: E731
        torch.nn.functional.silu(self.up_proj(x)) * self.gate_proj(x)
    )
    monkeypatch.setattr(SwiGLUFFN, "forward", forward)
    assert failed(run_one(subject, "swiglu")) == {"output"}


def test_a_mask_that_looks_ahead_is_found(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)
    forward = GQAAttention.forward

    def sees_all(
        self: GQAAttention, x: Tensor, cos: Tensor, sin: Tensor, mask: None, cache: None = None
    ) -> Tensor:
        everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        return forward(self, x, cos, sin, everything, cache)

    monkeypatch.setattr(GQAAttention, "forward", sees_all)
    assert failed(run_one(subject, "gqa")) == {"output of the fused kernel"}
    assert failed(run_one(subject, "layer")) == {"our block"}


def test_one_changed_weight_is_found(qwen_folder: Path) -> None:
    subject = make_subject(qwen_folder)
    with torch.no_grad():
        subject.ours.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-6  # type: ignore[union-attr]
    assert failed(run_one(subject, "tensors")) == {"values, as loaded", "values, as stored"}


def test_positions_off_by_one_in_the_cache_are_found(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)
    positions = KVCache.positions

    def late(self: KVCache, count: int) -> Tensor:
        return positions(self, count) + (count == 1)

    monkeypatch.setattr(KVCache, "positions", late)
    names = failed(run_one(subject, "cache"))
    assert {
        "keys of all layers, at the end",
        "logits with the cache against without, ours",
    } <= names


def test_a_model_that_ours_does_not_implement_is_studied_without_it(tmp_path: Path) -> None:
    shape = {"vocab_size": 352, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=322)).save_pretrained(tmp_path)
    make_qwen_tokenizer(tmp_path)
    sections = {s.name: s for s in run_parts(make_subject(tmp_path), list(PARTS))}
    assert {c.name for c in sections["reference"].comparisons} == {
        "greedy: loop, Hugging Face's model",
        "sampled: loop, Hugging Face's model",
    }
    assert not any(failed(section) for section in sections.values())
    assert "Left out" in sections["gqa"].notes[0]
    assert "'gpt2' model" in sections["gqa"].notes[0]
    assert sections["tensors"].tables["Every tensor"][1][-1] == "none"


def test_layer_in_and_out_are_saved(qwen_folder: Path) -> None:
    section = run_one(make_subject(qwen_folder, layer=2), "layer")
    tensors = load(section.files["layer_2.safetensors"])
    length = len(make_subject(qwen_folder).prompt_ids)
    assert tensors["layer.input"].shape == tensors["layer.output"].shape == (1, length, 48)
    assert tensors["cos"].shape == tensors["sin"].shape == (1, length, 8)
    assert not torch.equal(tensors["layer.input"], tensors["layer.output"])


def test_every_tensor_is_listed_with_its_name_on_both_sides(llama_folder: Path) -> None:
    table = run_one(make_subject(llama_folder), "tensors").tables["Every tensor"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert len(rows) == 3 * 9 + 3
    assert rows["model.layers.1.mlp.down_proj.weight"] == (
        "48 x 80",
        "float32",
        "Linear",
        f"{48 * 80 * 4:,}",
        "the same, in Linear",
    )
    assert rows["model.norm.weight"][2:] == ("LlamaRMSNorm", "192", "the same, in RMSNorm")


def test_files_are_listed_with_their_sha256(llama_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / MARK).write_text("{}")  # is not the model's
    listed = run_one(make_subject(folder), "tensors").tables["Files of the folder"]
    files = sorted(folder.iterdir())
    files.remove(folder / MARK)
    assert listed[1:] == [
        (file.name, f"{file.stat().st_size:,}", hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files
    ]


def test_device_is_named_with_its_memory() -> None:
    said = describe_device(torch.device("cpu"))
    assert f", {torch.get_num_threads()} threads, " in said
    assert re.search(r"[\d.]+ GB of memory$", said)


def test_module_tree_tells_equal_layers_once(qwen_folder: Path) -> None:
    lines = module_tree(make_subject(qwen_folder).theirs).splitlines()
    assert lines[0] == "Qwen2ForCausalLM()"
    assert sum("Qwen2DecoderLayer" in line for line in lines) == 1
    assert "      0..2: Qwen2DecoderLayer()" in lines
    assert any(line.strip().startswith("k_proj: Linear(in_features=48") for line in lines)


def test_scores_above_the_diagonal_are_not_compared(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(qwen_folder)
    found = components.trace_layer(subject)
    found["scores"] = found["scores"].tril() + 1e6 * torch.ones_like(found["scores"]).triu(1)
    monkeypatch.setattr(components, "trace_layer", lambda _: found)
    assert not failed(run_one(subject, "gqa"))


def test_who_shares_a_key_value_head(qwen_folder: Path) -> None:
    note = run_one(make_subject(qwen_folder), "gqa").notes[1]
    assert "the key/value head is 0 0 0 1 1 1." in note


def test_cache_shapes_at_prefill_and_decode(qwen_folder: Path) -> None:
    subject = make_subject(qwen_folder)
    n = len(subject.prompt_ids)
    part = run_one(subject, "cache")
    (table,) = part.tables.values()
    assert table[1:] == [
        (number, f"1 x 2 x {n} x 8", f"1 x 2 x {n + 1} x 8", f"1 x 2 x {n + 4} x 8")
        for number in range(3)
    ]
    assert f"A token takes {3 * 2 * 2 * 8 * 4:,} bytes" in part.notes[0]


def test_peak_memory_is_what_was_taken() -> None:
    peak = peak_bytes(torch.device("cpu"), lambda: torch.ones(20_000_000))
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert peak == pytest.approx(80e6, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, r"--layer 3 must lie within 0\.\.2"),
        (
            {"max_new_tokens": 64},
            r"study\.prompt and study\.max_new_tokens=64 take \d+ positions, .* 64",
        ),
    ],
)
def test_impossible_requests_are_refused(
    options: dict[str, int], message: str, qwen_folder: Path
) -> None:
    with pytest.raises(ParamsError, match=message):
        make_subject(qwen_folder, **options)


def test_a_teacher_not_fetched_yet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DecantError, match=r"holds no tokenizer\.json: run stages/fetch\.py"):
        make_subject(tmp_path / "cache" / "teacher")


def test_damaged_weights_are_one_sentence(qwen_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qwen_folder, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DecantError, match=r"model\.safetensors is damaged"):
        run_one(make_subject(folder), "architecture")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DecantError, match=r"the tokenizer of .* cannot be read"):
        make_subject(folder)


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer"])
def test_code_of_a_folder_is_not_run(
    kind: str, qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, proof = tmp_path / "model", tmp_path / "was run"
    shutil.copytree(qwen_folder, folder)
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w')\nclass Own: pass\n")
    file = folder / ("config.json" if kind == "AutoConfig" else "tokenizer_config.json")
    words = json.loads(file.read_text()) | {"model_type": "own", "tokenizer_class": "Own"}
    file.write_text(
        json.dumps(
            words | {"auto_map": {kind: "own.Own" if kind == "AutoConfig" else ["own.Own", None]}}
        )
    )
    monkeypatch.setattr("builtins.input", lambda *words: "y")  # transformers asks at a terminal
    with contextlib.suppress(DecantError):
        make_subject(folder)
    assert not proof.exists()


def test_speed_beyond_the_context_is_refused(qwen_folder: Path) -> None:
    with pytest.raises(ParamsError, match=r"study\.prompt_tokens=60 .* context of 64"):
        run_one(make_subject(qwen_folder, prompt_tokens=60), "speed")


def test_where_a_model_is(qwen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nto host")

    assert locate(str(qwen_folder), None) == qwen_folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(DecantError, match=r"--model=some/model .* \(no route to host\)"):
        locate("some/model", None)
    for absent in ("no_such_folder", str(qwen_folder.parent)):
        with pytest.raises(DecantError, match=r"no folder with a config\.json"):
            locate(absent, None)


def test_hub_snapshot_takes_safetensors_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot(hub_id: str, **options: object) -> str:
        asked.update(options, id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("some/model", "0123abc") == tmp_path
    assert (asked["id"], asked["revision"]) == ("some/model", "0123abc")
    patterns = json.dumps(asked["allow_patterns"])
    assert "safetensors" in patterns
    assert "tokenizer.json" in patterns
    assert ".bin" not in patterns
    assert ".py" not in patterns


@pytest.mark.network
def test_qwen_by_its_hub_id() -> None:
    subject = make_subject(locate("Qwen/Qwen2.5-0.5B", None), layer=0)
    parts = [name for name in PARTS if name != "speed"]
    sections = {section.name: section for section in run_parts(subject, parts)}
    assert not any(failed(section) for section in sections.values())
    assert "gives 151,665 ids, the embedding has 151,936 rows" in sections["tokenizer"].notes[0]
