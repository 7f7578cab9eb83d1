"""Any causal language model of transformers as student; and what teachers share with it.

Only the library's own classes are used, from a local folder of safetensors: no code of a folder is
run. Training takes hidden states and the head's matrix apart, so a model that does something to its
logits after the head is refused: by name where the config says so, and for all others by a probe of
a few tokens. Documents packed into one row are kept apart by their positions alone: where a
position is not the one before it plus one, transformers sees a new sequence, and masks attention
accordingly for whatever kernel and layers a model has, sliding windows included; a 4D mask of our
own would replace those. Models whose layers do not follow (recurrent ones, ALiBi) are found by a
probe too.

Shapes: B batch, L length, D hidden, V vocabulary rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DecantError, ParamsError
from pipeline.model.attention import document_positions
from pipeline.model.base import Student
from pipeline.runtime.optional import import_transformers

_PROBE_TOKENS = 8
_TOLERANCE = 1e-3  # of the largest value; float32 differs by 1e-6 between shapes of a product
_ROUNDING = 1e-4  # of the norm: where the probe saw no rounding at all
_LOGIT_CHANGES = (
    "logit_scale",  # Cohere
    "logits_scaling",  # Granite
    "lm_head_multiplier",  # Falcon-H1
    "final_logit_softcapping",  # Gemma 2
)


class LogitsError(DecantError):
    """The model does more to its logits than to multiply hidden states by its head's matrix."""


def load_causal_lm(folder: Path, dtype: torch.dtype, *, what: str) -> Any:
    """The model of a local folder, in evaluation mode, its weights complete.

    Args:
        what: the model's part in the pipeline, for the error's sentence.

    Raises:
        DecantError: no model, an unknown architecture, or missing tensors.
    """
    try:
        model, loading = import_transformers().AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # damage shows as errors of four libraries
        reason = " ".join(str(error).split())[:200]
        raise DecantError(
            f"{folder} is no usable {what} ({reason}): run stages/fetch.py, or name a whole folder "
            "with safetensors of an architecture that transformers knows"
        ) from error
    if missing := loading["missing_keys"]:  # transformers would start these at random
        raise DecantError(
            f"{folder} lacks {len(missing)} tensors, for example {min(missing)}: bring the whole "
            "model by stages/fetch.py"
        )
    return model.eval()


def require_plain_head(folder: Path, config: Any) -> None:
    """Refuse, by a LogitsError, configs that say that logits are scaled or capped."""
    for name in _LOGIT_CHANGES:
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            raise LogitsError(
                f"{folder} changes its logits after the head ({name}={value}), which Decant does "
                "not follow: choose a model without that"
            )


def body_states(model: Any, tokens: Tensor, **options: Tensor) -> Tensor:
    """Final hidden states [B, L, D] of a model of transformers."""
    hidden: Tensor = model.base_model(
        input_ids=tokens, use_cache=False, **options
    ).last_hidden_state
    return hidden


@torch.no_grad()
def keeps_documents_apart(model: Any, vocab_size: int) -> bool:
    """Whether a document comes out the same behind another one and alone, but for rounding.

    How much rounding does is seen from the same document in front, where nothing can leak into it.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        vocab_size: ids to take the documents' tokens from.
    """
    tokens = torch.linspace(0, vocab_size - 1, 2 * _PROBE_TOKENS, device=model.device).long()
    other, document = tokens.view(2, 1, _PROBE_TOKENS)
    positions = torch.arange(_PROBE_TOKENS, device=model.device).repeat(2)[None]

    def hidden(*documents: Tensor, **options: Tensor) -> Tensor:
        together = torch.cat(documents, 1)
        return body_states(model, together, **options).float()

    alone = hidden(document)
    try:
        behind = hidden(other, document, position_ids=positions)[:, _PROBE_TOKENS:]
        before = hidden(document, other, position_ids=positions)[:, :_PROBE_TOKENS]
    except (TypeError, ValueError):  # takes no position ids
        return False
    leak, rounding = (float((found - alone).norm()) for found in (behind, before))
    return leak <= 3.0 * rounding + _ROUNDING * float(alone.norm())


class HuggingFaceStudent(Student):
    """A causal language model of transformers, in float32, in training mode.

    Args:
        folder: Hugging Face folder with safetensors.
        layers: decoder layers to keep, in order (0-based, may not repeat); None keeps all.

    Raises:
        DecantError: no model.
        LogitsError: its logits are not hidden states times the head's matrix.
        ParamsError: `layers` names what is not there.
    """

    def __init__(self, folder: Path, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        model = load_causal_lm(folder, torch.float32, what="student")
        require_plain_head(folder, model.config)
        if layers is not None:
            model = _keep_layers(model, layers, folder)
        self.model = model
        self._require_product(folder)
        self._keeps_apart = keeps_documents_apart(model, self.vocab_size)
        self.model.train()  # from_pretrained leaves it in evaluation mode, without dropout

    @property
    def head_weight(self) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def max_seq_len(self) -> int | None:
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def body(self) -> nn.Module:
        body: nn.Module = self.model
        return body

    def hidden_states(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """As in `Student`. Raises DecantError for document masks that the model ignores."""
        if doc_ids is None:
            return body_states(self.model, tokens)
        if not self._keeps_apart:
            raise DecantError(
                f"a {self.model.config.model_type!r} student attends across documents whatever it "
                "is told: train it without document masks, or choose another architecture"
            )
        return body_states(self.model, tokens, position_ids=document_positions(doc_ids))

    @torch.no_grad()
    def _require_product(self, folder: Path) -> None:
        tokens = torch.arange(_PROBE_TOKENS)[None]
        logits = self.model(input_ids=tokens, use_cache=False).logits
        product = body_states(self.model, tokens) @ self.head_weight.T
        if not bool((product - logits).abs().max() <= _TOLERANCE * logits.abs().max()):
            raise LogitsError(
                f"the logits of {folder} are not its hidden states times its head's matrix (a "
                "bias, a scale or a cap follows), which training relies on: choose a model without"
            )


def _keep_layers(model: Any, layers: Sequence[int], folder: Path) -> Any:
    """The same model with chosen decoder layers only; lists a layer in the config are cut alike."""
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
    smaller.load_state_dict(_renumbered(model.state_dict(), stack, layers))
    smaller.generation_config = model.generation_config
    return smaller.eval()


def require_layers(layers: Sequence[int], count: int, folder: Path) -> None:
    """Refuse an empty choice of layers, one that repeats, or one beyond the model's."""
    outside = [i for i in layers if not 0 <= i < count]
    if outside or not layers or len(set(layers)) != len(layers):
        raise ParamsError(
            f"student.layers={list(layers)} must name different layers within 0..{count - 1} of "
            f"{folder}"
        )


def _renumbered(tensors: dict[str, Tensor], stack: str, layers: Sequence[int]) -> dict[str, Tensor]:
    """Tensors outside the stack of layers, and those of chosen layers under their new numbers."""
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
