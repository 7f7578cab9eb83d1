"""The shapes of teacher and student, from wherever they can be had.

A shape comes from the params (for a student with random weights), from a local config.json, from
the table of models used in recipes, or from the hub, in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.names import start_name, teacher_name
from pipeline.config.params import Params
from pipeline.config.source_params import TeacherParams
from pipeline.config.train_params import StudentParams
from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import DecantError, ParamsError
from pipeline.model.config_json import read_config_file, text_config
from pipeline.planning.decoder_shape import Experts, Shape
from pipeline.planning.known_shapes import known
from pipeline.planning.weight_format import WeightFormat, read_format

_UNCOUNTED = {
    "kv_lora_rank": "latent attention",
    "n_routed_experts": "experts beside shared ones",
    "n_shared_experts": "experts beside shared ones",
    "shared_expert_intermediate_size": "experts beside shared ones",
    "mlp_only_layers": "dense layers between sparse ones",
}
"""Keys of a config.json, if their values are not null, 0 or empty, that change what is counted."""


def teacher_shape(params: TeacherParams, folder: Path) -> tuple[str, Shape]:
    """Return name and shape of the teacher.

    Args:
        folder: paths.teacher, which holds its config.json once `fetch` has run.

    Raises:
        ParamsError: the shape cannot be found.
    """
    name = teacher_name(params)
    folders = [folder, params.folder.path] if params.source == "folder" else [folder]
    found = _at_hand(name, *folders)
    if found is None and params.source == "hub":
        found = _from_hub(params.hub.id, params.hub.revision)
    if found is None:
        raise ParamsError(
            f"the shape of the teacher {name} is not known here: run stages/fetch.py first, so "
            "that its config.json can be read"
        )
    return name, found


def student_shape(params: StudentParams, teacher: Shape) -> tuple[str, Shape]:
    """Return a description of the student's start, and its shape.

    Raises:
        ParamsError: the checkpoint is neither local nor in the table, or the teacher has fewer
            layers.
    """
    name = start_name(params.model_dump())
    if params.init == "layers":
        if outside := [i for i in params.layers if not 0 <= i < teacher.num_layers]:
            raise ParamsError(
                f"student.layers names layer {outside[0]}, and the teacher's are 0 to "
                f"{teacher.num_layers - 1}: choose among these"
            )
        return name, replace(teacher, num_layers=len(params.layers), weight_format=None)
    if params.init == "random":
        # pipeline/config/resolved.py has made them numbers.
        assert params.vocab_size != "auto"
        assert params.head_dim != "auto"
        return name, _from_config(params.model_dump())
    found = params.checkpoint and _at_hand(str(params.checkpoint), params.checkpoint)
    if not found:
        raise ParamsError(
            f"the shape of student.checkpoint={params.checkpoint} is not known here: download the "
            "folder, so that its config.json can be read"
        )
    return name, found


def tokenizer_ids(params: Params, folder: Path, teacher: Shape) -> tuple[int, str]:
    """Return the number of the tokenizer's ids, and a note if student.vocab_size=auto is a guess.

    Without the tokenizer, the teacher's rows are assumed, though the tokenizer may have fewer ids
    (Qwen2.5: 151,665 ids for 151,936 rows).

    Args:
        folder: the teacher's folder, whose tokenizer is counted once `fetch` has run.
    """
    try:
        return max(read_vocabulary(folder).tokens) + 1, ""
    except ValueError:  # no tokenizer that can be read (a DecantError), or one without ids
        uses = params.student.init == "random" and params.student.vocab_size == "auto"
        rows = f"{teacher.vocab_size:,}"
        guess = f", a vocabulary of the teacher's {rows} rows assumed for student.vocab_size=auto"
        return teacher.vocab_size, guess if uses else ""


def _at_hand(name: str, *folders: Path) -> Shape | None:
    """Return the shape in the first folder with a config.json, else the one in the table."""
    for folder in folders:
        if (folder / "config.json").exists():
            return _read(folder / "config.json")
    return known(name)


def _from_hub(hub_id: str, revision: str) -> Shape | None:
    from huggingface_hub import hf_hub_download

    try:
        return _read(Path(hf_hub_download(hub_id, "config.json", revision=revision)))
    except DecantError:
        raise
    except Exception:  # HTTP, SSL, offline mode and file errors from several libraries
        return None


def _read(file: Path) -> Shape:
    raw = read_config_file(file)
    inner = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw} | {**text_config(raw)}
    parts = [what for key, what in _UNCOUNTED.items() if inner.get(key)]
    if "linear_attention" in (inner.get("layer_types") or ()):
        parts.append("linear attention")
    if inner.get("decoder_sparse_step", 1) != 1:
        parts.append("dense layers between sparse ones")
    if parts:
        raise DecantError(
            f"{file} is of a model with {parts[0]}, which a plan cannot count: plan with the "
            "config.json of a model of Qwen3's or Llama's kind and a similar size"
        )
    try:
        return _from_config(inner, read_format(raw))
    except (LookupError, TypeError) as error:
        raise DecantError(
            f"{file} does not give the shape of a decoder ({type(error).__name__}: {error}): plans "
            "are made for models whose config.json has the keys of Qwen2's or Llama's"
        ) from None


def _from_config(raw: Mapping[str, Any], weight_format: WeightFormat | None = None) -> Shape:
    """Read a shape from a config.json, or from the section `student`, with its shorter names."""
    heads = raw.get("num_attention_heads") or raw["num_heads"]
    kv_heads = raw.get("num_key_value_heads") or raw.get("num_kv_heads") or heads
    model_type = raw.get("model_type", "")
    bias = raw.get("attention_bias", model_type in ("qwen2", "gpt_oss"))
    experts = _experts(raw)
    width = raw.get("moe_intermediate_size") if experts else None
    head_size = 128 if model_type == "qwen3" else raw["hidden_size"] // heads  # without head_dim
    return Shape(
        hidden_size=raw["hidden_size"],
        num_layers=raw.get("num_hidden_layers") or raw["num_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=raw.get("head_dim") or head_size,
        intermediate_size=width or raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        tied=raw.get("tie_word_embeddings", raw.get("tie_embeddings", False)),
        qkv_bias=bias,
        o_bias=bias and model_type not in ("", "qwen2"),
        qk_norm=raw.get("qk_norm", model_type.startswith("qwen3")),
        sinks=model_type == "gpt_oss",
        experts=experts,
        model_type=model_type,
        weight_format=weight_format,
    )


def _experts(raw: Mapping[str, Any]) -> Experts | None:
    number = raw.get("num_local_experts") or raw.get("num_experts")
    if not number:
        return None
    biased = raw.get("model_type") == "gpt_oss"
    return Experts(number=number, per_token=raw["num_experts_per_tok"], biased=biased)
