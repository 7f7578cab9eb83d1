"""What a GGUF file says of a model, and how its tensors differ, for each architecture.

llama.cpp's own converter is not called, since no well-kept package holds it (read in 2026-11):
`gguf`, which its authors publish, has the format alone; `convert-hf-to-gguf` is another person's
copy with two releases, which installs its own `gguf` over that one and a package named
`conversion`. Names and metadata are the converter's. What llama.cpp computes otherwise than
transformers is refused, or adapted here:

- It rotates neighbouring dimensions of a Llama's or Mistral's queries and keys, where Hugging Face
  rotates dimension i with i + E / 2, so their rows are reordered; those of the others are not.
- It has no sliding window for Mistral and Phi-3. Within the window the two agree, so the file's
  context ends there.
- It takes LongRoPE's long factors for a context beyond the original one from the first token on,
  where transformers takes the short ones until the text is that long.
- Gemma's norms multiply by 1 + weight, and the file holds the sum. llama.cpp scales Gemma's scores
  by the head's width, so the weight of `q_norm` takes the ratio to `query_pre_attn_scalar`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DecantError
from pipeline.model.config_json import read_config_json
from pipeline.model.decoder import ModelConfig
from pipeline.model.huggingface import empty_model
from pipeline.model.rope import (
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    inverse_frequencies,
    read_scaling,
)
from pipeline.model.weights import CLASSES, VariantError, read_config

_GEMMA_27B_LAYERS = 62
"""Number of layers by which llama.cpp recognises Gemma 3 27B, whose scores have another scale."""


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """A model as a GGUF file describes it.

    Attributes:
        architecture: llama.cpp's name.
        num_layers, num_rows: numbers of decoder layers and of embedding rows.
        tied: llama.cpp uses the embedding as the head.
        metadata: GGUFWriter's method without `add_` -> its argument.
        tensors: tensors that the folder does not hold, by their name in the file.
        rotated: projection -> number of heads whose rows are reordered.
        norm_offset: is added to the weights of norms.
        query_scale: factor of `q_norm`'s weights.
    """

    architecture: str
    num_layers: int
    num_rows: int
    tied: bool
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rotated: Mapping[str, int] = field(default_factory=dict)
    norm_offset: float = 0.0
    query_scale: float = 1.0

    def adapt(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the folder as the file holds it, in float32."""
        tensor = tensor.float()
        module = name.split(".")[-2]
        if module in self.rotated:
            tensor = interleave_halves(tensor, self.rotated[module])
        if module.endswith("norm") and self.norm_offset:
            tensor = tensor + self.norm_offset
        return tensor * self.query_scale if module == "q_norm" else tensor


def interleave_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [heads * E, ...] so that dimensions i and i + E / 2 of a head are neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def require_convertible(folder: Path) -> GgufModel:
    """Describe the model of a folder as a GGUF file does.

    Raises:
        DecantError: it has another architecture, or a variant that llama.cpp computes differently.
    """
    kind = read_config_json(folder).get("model_type")
    if kind in _OF_TRANSFORMERS:
        return _OF_TRANSFORMERS[kind](folder, empty_model(folder).config)
    if kind not in CLASSES:
        known = ", ".join((*CLASSES, *_OF_TRANSFORMERS))
        raise _refusal(f"{folder} holds a {kind!r} model, and Decant writes {known}")
    try:
        return _of_ours(folder, read_config(folder))
    except VariantError as error:
        raise _refusal(str(error)) from None


def _refusal(reason: str) -> DecantError:
    return DecantError(
        f"no GGUF file can be written of this model ({reason}): set export.gguf=[], or use "
        "llama.cpp's own converter on the Hugging Face folder"
    )


def _of_ours(folder: Path, config: ModelConfig) -> GgufModel:
    """Describe a folder that our own model reads."""
    architecture = "qwen2" if config.attention_bias else "llama"
    if config.qk_norm:
        architecture = "qwen3"
    if architecture == "qwen2" and config.head_dim:
        raise _refusal(
            f"{folder} is a qwen2 model with head_dim={config.head_dim}, and llama.cpp supports "
            f"hidden_size / num_attention_heads = {config.hidden_size / config.num_heads:g}"
        )
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    rope, tensors = _rope(
        folder, architecture, config.head_size, config.rope_theta, config.rope_scaling
    )
    lengths = {"key_length": config.head_size, "value_length": config.head_size}
    return GgufModel(
        architecture=architecture,
        num_layers=config.num_layers,
        num_rows=config.vocab_size,
        tied=config.tie_embeddings,
        metadata={
            "context_length": config.max_seq_len,
            "embedding_length": config.hidden_size,
            "block_count": config.num_layers,
            "feed_forward_length": config.intermediate_size,
            "head_count": config.num_heads,
            "head_count_kv": config.num_kv_heads,
            **(lengths if config.qk_norm or config.head_dim else {}),
            "layer_norm_rms_eps": config.norm_eps,
            "vocab_size": config.vocab_size,
            "rope_dimension_count": config.head_size,
            **rope,
        },
        tensors=tensors,
        rotated=heads if architecture == "llama" else {},
    )


def _rope(
    folder: Path, architecture: str, head_size: int, theta: float, scaling: RopeScaling | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return metadata and tensors of the rotary frequencies.

    Raises:
        DecantError: llama.cpp has no such frequencies for the architecture.
    """
    found: dict[str, Any] = {"rope_freq_base": theta}
    if isinstance(scaling, Llama3Scaling):
        if architecture != "llama":
            raise DecantError(
                f"{folder} is a {architecture} model with rope type 'llama3', which llama.cpp has "
                "for llama alone: set export.gguf=[]"
            )
        plain = inverse_frequencies(head_size, theta, None)
        slowed = inverse_frequencies(head_size, theta, scaling)
        return found, {"rope_freqs.weight": plain / slowed}
    if scaling is not None:
        found["rope_scaling_type"] = _scaling_type(scaling)
        found["rope_scaling_factor"] = scaling.factor
    if isinstance(scaling, YarnScaling):
        named = scaling.factor, scaling.original_max_position_embeddings
        plain_yarn = YarnScaling(factor=named[0], original_max_position_embeddings=named[1])
        limits = scaling.beta_fast, scaling.beta_slow, scaling.truncate
        same = math.isclose(scaling.amplitude(), plain_yarn.amplitude(), rel_tol=1e-6)
        if not same or limits != (plain_yarn.beta_fast, plain_yarn.beta_slow, plain_yarn.truncate):
            raise DecantError(
                f"{folder} has a YaRN with an attention_factor, mscale, beta or truncate of its "
                "own, which llama.cpp does not follow: set export.gguf=[]"
            )
        found["rope_scaling_orig_ctx_len"] = named[1]
    return found, {}


def _scaling_type(scaling: RopeScaling) -> Any:
    from gguf import RopeScalingType

    return RopeScalingType(scaling.rope_type)


def _sizes(config: Any, head_size: int) -> dict[str, Any]:
    """Return the metadata that follow from the sizes in a config of transformers."""
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    return {
        "context_length": context if window is None else min(context, window),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": head_size,
        "value_length": head_size,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_dimension_count": head_size,
    }


def _require(folder: Path, config: Any, **supported: Any) -> None:
    """Refuse a config in which a value differs from the only one that llama.cpp computes with."""
    for name, wanted in supported.items():
        found = getattr(config, name, wanted)
        if found != wanted:
            raise _refusal(f"{folder} has {name}={found!r}, and llama.cpp supports {wanted!r}")


def _mistral(folder: Path, config: Any) -> GgufModel:
    _require(folder, config, hidden_act="silu")
    theta = float(config.rope_parameters["rope_theta"])
    try:
        scaling = read_scaling(config.rope_parameters, config.max_position_embeddings)
    except DecantError as error:
        raise _refusal(f"{folder} has {error}") from None
    rope, tensors = _rope(folder, "llama", config.head_dim, theta, scaling)
    return GgufModel(
        architecture="llama",
        num_layers=config.num_hidden_layers,
        num_rows=config.vocab_size,
        tied=config.tie_word_embeddings,
        metadata=_sizes(config, config.head_dim) | rope,
        tensors=tensors,
        rotated={"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads},
    )


def _phi3(folder: Path, config: Any) -> GgufModel:
    head_size = config.hidden_size // config.num_attention_heads
    _require(folder, config, hidden_act="silu", head_dim=head_size)
    rope = config.rope_parameters
    metadata = _sizes(config, head_size) | {
        "rope_dimension_count": int(head_size * rope["partial_rotary_factor"]),
        "rope_freq_base": float(rope["rope_theta"]),
        "rope_scaling_orig_ctx_len": config.original_max_position_embeddings,
        "sliding_window": 0,  # must be there, and is not used
    }
    tensors = {}
    if rope["rope_type"] == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        _, metadata["rope_scaling_attn_factors"] = ROPE_INIT_FUNCTIONS["longrope"](config, None)
        tensors = {
            f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"])
            for length in ("long", "short")
        }
    return GgufModel(
        architecture="phi3",
        num_layers=config.num_hidden_layers,
        num_rows=config.vocab_size,
        tied=config.tie_word_embeddings,
        metadata=metadata,
        tensors=tensors,
    )


def _gemma3(folder: Path, config: Any) -> GgufModel:
    _require(
        folder,
        config,
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=True,
        use_bidirectional_attention=False,
    )
    full, sliding = (config.rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding"))
    if full["rope_type"] not in ("default", "linear") or sliding["rope_type"] != "default":
        raise _refusal(
            f"{folder} has rope types {full['rope_type']!r} and {sliding['rope_type']!r}, and "
            "llama.cpp supports 'default' or 'linear' for full attention, 'default' for sliding"
        )
    scaling = read_scaling(full, config.max_position_embeddings)
    rope, _ = _rope(folder, "gemma3", config.head_dim, float(full["rope_theta"]), scaling)
    window = {}
    if "sliding_attention" in config.layer_types:
        window = {
            "sliding_window": config.sliding_window,
            "sliding_window_pattern": _pattern(folder, config.layer_types),
            "rope_freq_base_swa": float(sliding["rope_theta"]),
        }
    scored = config.head_dim
    if config.num_hidden_layers == _GEMMA_27B_LAYERS:
        scored = config.hidden_size / config.num_attention_heads
    return GgufModel(
        architecture="gemma3",
        num_layers=config.num_hidden_layers,
        num_rows=config.vocab_size,
        tied=True,
        metadata={
            **_sizes(config, config.head_dim),
            **rope,
            **window,
            "context_length": config.max_position_embeddings,
        },
        norm_offset=1.0,
        query_scale=math.sqrt(scored / config.query_pre_attn_scalar),
    )


def _pattern(folder: Path, layer_types: list[str]) -> int:
    """Return the number p with full attention in the layers p - 1, 2 p - 1, ... alone.

    Raises:
        DecantError: there is none.
    """
    full = [kind == "full_attention" for kind in layer_types]
    period = full.index(True) + 1 if any(full) else len(full) + 1
    if full != [(number + 1) % period == 0 for number in range(len(full))]:
        raise _refusal(
            f"{folder} has full attention in the layers "
            f"{[number for number, is_full in enumerate(full) if is_full]}, and llama.cpp supports "
            "every n-th layer, so choose student.layers accordingly"
        )
    return period


_OF_TRANSFORMERS: dict[str, Callable[[Path, Any], GgufModel]] = {
    "mistral": _mistral,
    "phi3": _phi3,
    "gemma3_text": _gemma3,
}
"""The architectures that transformers runs and that can be written, by `model_type`."""
