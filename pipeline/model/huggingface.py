"""Run any causal language model of transformers as a student, and share code with teachers.

Only the library's own classes are used, from a local folder of safetensors; no code from a folder
is run. Training uses hidden states and the head's matrix separately. A scale or a soft cap after
the head is known from the config (pipeline/model/logit_transform.py). A probe of a few tokens
compares the model's own logits with ours, and a model that does anything else in, before or after
its head is refused.

Of a model that reads images or sound too, only the language model is used: its decoder is run on
token ids, without the layers that other inputs pass through.

Documents packed into one row are kept apart only by their positions. Where a position is not one
more than the previous one, transformers sees a new sequence and masks attention accordingly, for
every kernel and every type of layer that a model has, including sliding windows; a 4D mask of our
own would replace those. gpt-oss, which takes one mask for each type of layer, is given those that
transformers makes from positions. Models whose layers ignore positions in this way (recurrent ones,
ALiBi) are found by a probe too.

Shapes: B batch, L length, D hidden, V vocabulary rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pipeline.errors import DecantError, ParamsError, memory_shortage, reason_of
from pipeline.model.attention_mask import document_positions
from pipeline.model.config_json import load_config, read_config_json
from pipeline.model.folder import require_regular_folder
from pipeline.model.logit_transform import UNCHANGED, LogitTransform
from pipeline.model.quantization import read_quantization
from pipeline.model.student import Student
from pipeline.runtime.device import dtype_name
from pipeline.runtime.optional import import_transformers
from pipeline.runtime.transfer import to_device

_PROBE_TOKENS = 8
_REPEATED = 1e-3  # relative to the largest value: the body run twice; kernels may add in any order
_ROUNDED = 2e-2  # relative to the largest value: a product in bfloat16 against one in float32
_SAME = 1e-6  # relative to the largest value: the head's output against the final logits
_TRANSFORMED = 1e-5  # the same, after a scale or a soft cap in float32
_ROUNDING = 1e-4  # relative to the norm: allowed even if the probe saw no rounding
_MASKS_WITHOUT_POSITIONS = {"gpt_oss"}
"""Types of models that make their masks without positions, but take masks by type of layer."""
_TOWERS = ("visual", "vision_tower", "vision_model", "audio_tower")
_NUMBERS = {"layer_idx", "layer_id", "layer_number", "block_idx", "training"}
"""Attributes of a layer that may differ when the same layer is at another position."""


class LogitsError(DecantError):
    """The logits are not hidden states times the head's matrix plus bias, scaled and capped."""


def load_causal_lm(
    folder: Path,
    dtype: torch.dtype,
    *,
    what: str,
    device: torch.device | None = None,
    dequantize: bool = False,
    **options: Any,
) -> Any:
    """Load the model of a local folder in evaluation mode and require that no weights are missing.

    Args:
        what: the model's role in the pipeline, for the error message.
        device: where quantised weights are loaded, as they cannot be moved and rounded later; None
            refuses them.
        dequantize: convert quantised weights to `dtype`.
        options: further arguments of `from_pretrained`.

    Raises:
        DecantError: there is no model, its architecture is unknown, or tensors are missing.
        QuantizedError: it is quantised, and cannot run so here (pipeline/model/quantization.py).
    """
    require_regular_folder(folder)
    read_config_json(folder)
    if (quantization := read_quantization(folder)) is not None:
        options |= quantization.load_options(dtype, device, what=what, dequantize=dequantize)
    try:
        model, loading = _auto_class(load_config(folder)).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # damage can raise errors of four libraries
        if memory_shortage(error):
            raise
        raise _unusable(folder, what, error) from error
    if missing := loading["missing_keys"]:  # transformers would initialise these at random
        raise DecantError(
            f"{folder} lacks {len(missing)} tensors, for example {min(missing)}: download the "
            "whole model by stages/fetch.py"
        )
    if quantization is not None:
        unexpected = set(loading["unexpected_keys"])
        quantization.require_loaded_so(model, unexpected, dtype, what=what, dequantize=dequantize)
    return model.eval()


def _auto_class(config: Any) -> Any:
    """Return the class that opens a model: of a language model, or of one that reads images too.

    transformers lists some of the latter, such as Gemma 3, among the former.
    """
    transformers = import_transformers()
    both = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    return next((auto for auto in both if type(config) in auto._model_mapping), both[0])


def empty_model(folder: Path) -> Any:
    """Build the model of a local folder without weights, on the device "meta".

    Raises:
        DecantError: there is no model, or its architecture is unknown.
    """
    require_regular_folder(folder)
    read_config_json(folder)
    try:
        config = load_config(folder)
        with torch.device("meta"):
            return _auto_class(config).from_config(config)
    except Exception as error:  # as in load_causal_lm
        raise _unusable(folder, "model", error) from error


def _unusable(folder: Path, what: str, error: Exception) -> DecantError:
    return DecantError(
        f"{folder} is not a usable {what} ({reason_of(error)}): run stages/fetch.py, or name a "
        "complete folder with safetensors of an architecture that transformers knows"
    )


@torch.no_grad()
def require_own_logits(folder: Path, model: Any) -> None:
    """Refuse a model whose logits are not its final hidden states passed through its head.

    The model's own forward is watched: the head's input must be the body's output, the head's
    output must be the product of the two, and the logits must be that output after the config's
    LogitTransform. Because each step is checked separately, even a small change shows in any number
    format.

    Raises:
        LogitsError: something happens before, in or after the head, or the head is not used.
        DecantError: the model cannot be run, for example because sizes do not fit together.
    """
    head = model.get_output_embeddings()
    if head is None or body_of(model) is model:
        raise without_head(folder, model)
    hidden, entered, left, logits = _watch_head(folder, model, head)
    transform = LogitTransform.of_config(model.config)
    exact = model.dtype == torch.float32
    again, same = (_REPEATED, _TRANSFORMED) if exact else (_ROUNDED, _ROUNDED)
    scaled = hidden * transform.scale  # MiniCPM3 does this before its head
    if transform.scale != 1.0 and entered is not None and _close(entered, scaled, again):
        hidden, transform = entered, replace(transform, scale=1.0)
    product = left
    if entered is not None:
        hidden = hidden.to(entered.dtype)  # Mamba's are float32 beside a bfloat16 head
        if type(head) is not nn.Linear:
            product = _product(head, entered)
    expected = left
    if left is not None and transform != UNCHANGED:
        expected = transform.apply_(left.float().clone())
    for where, found, wanted, tolerance in (
        ("before", entered, hidden, _REPEATED),
        ("in", left, product, again),
        ("after", expected, logits, _SAME if transform == UNCHANGED else same),
    ):
        if found is None or wanted is None or not _close(found, wanted, tolerance):
            raise LogitsError(
                f"the logits of {folder} are not its hidden states times its head's matrix, scaled "
                f"and capped as its config says: a {model.config.model_type!r} model does more "
                f"{where} the head, which Decant does not support: choose a model without that"
            )


def without_head(folder: Path, model: Any) -> LogitsError:
    """Return the error for a model whose head is missing, or part of its body."""
    return LogitsError(
        f"{folder} holds a {model.config.model_type!r} model without a head apart from its body, "
        "which Decant needs: choose a model with one"
    )


def _watch_head(
    folder: Path, model: Any, head: Any
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Run a few tokens; return the body's output, the head's input and output, and the logits.

    Input and output are None if the model does not call its head.
    """
    tokens = probe_tokens(model)
    passed: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, args, out: passed.append((args[0], out.clone())))
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
        hidden = body_states(model, tokens)
    except Exception as error:  # model classes fail in many ways on foreign sizes
        reason = reason_of(error)
        other = "" if model.dtype == torch.float32 else "try float32, or "
        raise DecantError(
            f"the model of {folder} cannot be run in {dtype_name(model.dtype)} ({reason}): {other}"
            "download the whole model again"
        ) from error
    finally:
        hook.remove()
    entered, left = passed[0] if passed else (None, None)
    return hidden, entered, left, logits


def probe_tokens(model: Any) -> Tensor:
    """Return a short row of tokens, int64 [1, L], on the model's device."""
    return torch.arange(_PROBE_TOKENS, device=model.device)[None]


def _product(head: Any, states: Tensor) -> Tensor:
    bias = getattr(head, "bias", None)
    product: Tensor = states.float() @ head.weight.float().T
    return product if bias is None else product + bias.float()


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if found.shape != wanted.shape:
        return False
    found, wanted = found.float(), wanted.float()
    if not bool(wanted.isfinite().all()):  # reported where the numbers are used
        return True
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def is_part_of_a_larger_model(config: Any) -> bool:
    """Return whether the language model is a part, for example of one that reads images too."""
    return config.get_text_config(decoder=True) is not config


def body_of(model: Any) -> Any:
    """Return the decoder without its head; the model itself if the two are not apart."""
    if is_part_of_a_larger_model(model.config):
        return model.get_decoder()
    # The prefix of Llama 4's text models is that of the larger model.
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def body_states(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the final hidden states [B, L, D] of a transformers model.

    Args:
        positions: int64 [B, L], restarting at each document; None counts from the row's start.
    """
    if isinstance(model, FSDPModule):
        return _states_within(model, tokens, positions)
    return run_body(model, tokens, positions)


def run_body(model: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return what `body_states` does, where the body's weights are gathered if they are sharded."""
    options = {} if positions is None else document_options(model, positions)
    hidden: Tensor = body_of(model)(input_ids=tokens, use_cache=False, **options).last_hidden_state
    return hidden


def _states_within(model: Any, tokens: Tensor, positions: Tensor | None) -> Tensor:
    """Return what the body computes within the model's own forward.

    FSDP2 gathers the weights outside the layers only there. Logits beyond the last ones are not
    computed.
    """
    options = {} if positions is None else document_options(model, positions)
    found: list[Tensor] = []
    hook = body_of(model).register_forward_hook(
        lambda _, __, output: found.append(output.last_hidden_state)
    )
    try:
        model(input_ids=tokens, use_cache=False, logits_to_keep=1, **options)
    finally:
        hook.remove()
    if not found:
        raise RuntimeError("its forward does not call its body")
    return found[0]


def document_options(model: Any, positions: Tensor) -> dict[str, Any]:
    """Return the arguments of a model or its body for documents at these positions."""
    config = model.config.get_text_config(decoder=True)
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        # Qwen2.5-VL takes positions for the mask, then time, height and width for rotations.
        return {"position_ids": positions[None].expand(4, -1, -1)}
    if config.model_type not in _MASKS_WITHOUT_POSITIONS:
        return {"position_ids": positions}
    shape = positions.new_empty(*positions.shape, 1, dtype=model.dtype)
    given = {"attention_mask": None, "past_key_values": None, "position_ids": positions}
    masks = import_transformers().masking_utils
    made = {
        "full_attention": masks.create_causal_mask(config, shape, **given),
        "sliding_attention": masks.create_sliding_window_causal_mask(config, shape, **given),
    }
    return {"position_ids": positions, "attention_mask": made}


def without_other_inputs(model: Any) -> Any:
    """Remove the layers that only images or sound pass through, and return the model."""
    for module in (model, model.base_model):
        for name in _TOWERS:
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
    return model


def max_positions(config: Any) -> int | None:
    """Return the longest row that a transformers model can read; None if its config has no limit.

    YaRN is enabled by `rope_scaling` alone, while the config still gives the training context.
    """
    config = config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") == "yarn" and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, round(rope["factor"] * original))
    return limit


@torch.no_grad()
def keeps_documents_apart(model: Any, vocab_size: int) -> bool:
    """Return whether a document's output is the same after another document and alone.

    Differences from rounding are allowed. Their size is measured with the same document first in
    the row, where nothing can leak into it.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        vocab_size: number of ids that the documents' tokens are taken from.
    """
    tokens = torch.linspace(0, vocab_size - 1, 2 * _PROBE_TOKENS, device=model.device).long()
    other, document = tokens.view(2, 1, _PROBE_TOKENS)
    positions = torch.arange(_PROBE_TOKENS, device=model.device).repeat(2)[None]

    def hidden(*documents: Tensor, positions: Tensor | None = None) -> Tensor:
        return body_states(model, torch.cat(documents, 1), positions).float()

    alone = hidden(document)
    try:
        behind = hidden(other, document, positions=positions)[:, _PROBE_TOKENS:]
        before = hidden(document, other, positions=positions)[:, :_PROBE_TOKENS]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that takes no such position ids may fail in any way
        return False
    leak, rounding = (float((found - alone).norm()) for found in (behind, before))
    return leak <= 3.0 * rounding + _ROUNDING * float(alone.norm())


class HuggingFaceStudent(Student):
    """A causal language model of transformers, in float32, in training mode.

    Args:
        folder: Hugging Face folder with safetensors.
        layers: decoder layers to keep, in order (0-based, may not repeat); None keeps all.

    Raises:
        DecantError: there is not a usable model in the folder.
        LogitsError: its logits are not hidden states times the head's matrix.
        ParamsError: `layers` names a layer that does not exist.
    """

    def __init__(self, folder: Path, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        model = load_causal_lm(folder, torch.float32, what="student")
        if layers is not None:
            model = _keep_layers(model, layers, folder)
        self.model = model
        require_own_logits(folder, model)
        if is_part_of_a_larger_model(model.config):  # the rest would never get a gradient
            model.requires_grad_(False)
            for part in (body_of(model), model.get_output_embeddings()):
                part.requires_grad_(True)
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            raise LogitsError(
                f"{folder} has a bias in its head, which training does not support: choose a model "
                "without"
            )
        self._logit_transform = LogitTransform.of_config(model.config)
        self._keeps_apart = keeps_documents_apart(model, self.vocab_size)
        self.model.train()  # from_pretrained leaves it in evaluation mode, without dropout

    @property
    def head_weight(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def logit_transform(self) -> LogitTransform:
        return self._logit_transform

    @property
    def max_seq_len(self) -> int | None:
        return max_positions(self.model.config)

    @property
    def body(self) -> nn.Module:
        body: nn.Module = self.model
        return body

    def hidden_states(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """See `Student`. Raise a DecantError for document masks that the model would ignore."""
        if doc_ids is None:
            return body_states(self.model, tokens)
        if not self._keeps_apart:
            raise DecantError(
                f"a {self.model.config.model_type!r} student always attends across "
                "documents: train it without document masks, or choose another architecture"
            )
        return body_states(
            self.model, tokens, to_device(document_positions(doc_ids), tokens.device)
        )


def _keep_layers(model: Any, layers: Sequence[int], folder: Path) -> Any:
    """Return the same model with only the chosen decoder layers; per-layer lists are cut alike.

    Raises:
        DecantError: its layers cannot be selected, or one would become another type of layer at its
            new position (some architectures decide by position which layers are sparse, or attend
            locally).
    """
    if is_part_of_a_larger_model(model.config):
        raise DecantError(
            f"{folder} holds a {model.config.model_type!r} model, whose language model is a part of"
            " a larger one, and layers are not chosen from these: set student.init to checkpoint"
        )
    count = model.config.num_hidden_layers
    stacks = (
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )
    stack = next(stacks, None)
    if stack is None:
        raise DecantError(
            f"{folder} has no list of {count} decoder layers to choose from: set student.init to "
            "checkpoint"
        )
    require_layers(layers, count, folder)
    config = copy.deepcopy(model.config)
    for name, value in vars(model.config).items():  # layer_types and the like
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[i] for i in layers])
    config.num_hidden_layers = len(layers)
    smaller = type(model)(config)
    for place, (number, layer) in enumerate(zip(layers, smaller.get_submodule(stack), strict=True)):
        if difference := _difference(model.get_submodule(f"{stack}.{number}"), layer):
            raise DecantError(
                f"layer {number} of {folder} would be another kind of layer at place {place} of "
                f"the student ({difference}), since a {model.config.model_type!r} model counts its "
                f"layers: choose others than student.layers={list(layers)}"
            )
    smaller.load_state_dict(_renumbered(model.state_dict(), stack, layers))
    smaller.generation_config = model.generation_config
    return smaller.eval()


def _difference(wanted: nn.Module, found: nn.Module) -> str | None:
    """Describe how two layers differ, besides weights and layer numbers; None if they do not."""
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in (wanted, found)]
    if shapes[0] != shapes[1] and shapes[0].keys() == shapes[1].keys():
        name = next(name for name, shape in shapes[0].items() if shape != shapes[1][name])
        return f"{name} {tuple(shapes[0][name])}, {tuple(shapes[1][name])}"
    pairs = dict(wanted.named_modules()), dict(found.named_modules())
    for name in sorted(pairs[0].keys() | pairs[1].keys()):
        one, two = (modules.get(name) for modules in pairs)
        if type(one) is not type(two):
            return f"{name or 'layer'} {type(one).__name__}, {type(two).__name__}"
        for key in sorted(vars(one).keys() & vars(two).keys() - _NUMBERS):
            values = vars(one)[key], vars(two)[key]
            simple = all(isinstance(value, bool | int | float | str | None) for value in values)
            if simple and values[0] != values[1]:
                return f"{name}.{key}".lstrip(".") + f"={values[0]!r}, {values[1]!r}"
    return None


def require_layers(layers: Sequence[int], count: int, folder: Path) -> None:
    """Refuse a selection of layers that is empty, repeats one or exceeds the model's layers."""
    outside = [i for i in layers if not 0 <= i < count]
    if outside or not layers or len(set(layers)) != len(layers):
        raise ParamsError(
            f"student.layers={list(layers)} must name different layers within 0..{count - 1} of "
            f"{folder}"
        )


def _renumbered(tensors: dict[str, Tensor], stack: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the tensors outside the stack and those of the chosen layers, renumbered."""
    place = {source: i for i, source in enumerate(layers)}
    pattern = re.compile(rf"^{re.escape(stack)}\.(\d+)\.(.+)$")
    kept = {}
    for name, tensor in tensors.items():
        match = pattern.match(name)
        if match is None:
            kept[name] = tensor
        elif int(match[1]) in place:
            kept[f"{stack}.{place[int(match[1])]}.{match[2]}"] = tensor
    return kept
