"""Record the tensors in one decoder layer of Hugging Face's model while it reads the prompt.

They are recorded from the running model: hooks take the inputs and outputs of each module, and an
attention function registered with transformers takes queries, keys and values after rotation, then
calls the `eager` function from the model's own file.

Shapes: B = 1 batch, L prompt length, D hidden, H query heads, G key/value heads, E head size, F
intermediate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.study.subject import Subject

_NAME = "decant_recorder"


def trace_layer(subject: Subject) -> dict[str, Tensor]:
    """Return the tensors of layer `subject.layer`, by name.

    Returns:
        cos, sin [1, L, E]; for the layer and its modules (`input_layernorm`, `self_attn`,
        `q_proj`, `mlp`, ...) NAME.input and NAME.output, [1, L, width]; `layer.input` and
        `layer.output`; for the attention `query` [1, H, L, E], `key` and `value` [1, G, L, E] after
        rotation, `scores` (scaled, before the mask) and `weights` [1, H, L, L].
    """
    model = subject.theirs.model
    layer = model.layers[subject.layer]
    found: dict[str, Tensor] = {}
    modules = {"layer": layer, **{n.split(".")[-1]: m for n, m in layer.named_modules() if n}}
    with torch.no_grad(), ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(_recorder(name, found), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(_recorded_attention(subject.theirs, layer.self_attn, found))
        subject.theirs(subject.prompt, use_cache=False)
    return found


def _recorder(name: str, found: dict[str, Tensor]) -> Callable[..., None]:
    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        found[f"{name}.input"] = entered
        found[f"{name}.output"] = output[0] if isinstance(output, tuple) else output
        if name == "layer":
            found["cos"], found["sin"] = kwargs["position_embeddings"]

    return record


@contextmanager
def _recorded_attention(model: Any, attention: Any, found: dict[str, Tensor]) -> Iterator[None]:
    """Record the intermediates of `attention` in `found` within the block; change nothing else."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    source = sys.modules[type(attention).__module__]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        mixed, weights = source.eager_attention_forward(module, query, key, value, *args, **options)
        if module is attention:
            keys = source.repeat_kv(key, module.num_key_value_groups)
            scores = query @ keys.transpose(2, 3) * module.scaling
            found.update(query=query, key=key, value=value, scores=scores, weights=weights)
        return mixed, weights

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
