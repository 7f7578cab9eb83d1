"""A Hugging Face causal language model as teacher, run by transformers in this process.

An architecture is tested for keeping packed documents apart before Decant relies on it
(pipeline/model/huggingface.py says how they are kept apart).

Shapes: B batch, L length, D hidden, V valid vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import DecantError
from pipeline.model.attention_mask import document_positions
from pipeline.model.huggingface import (
    body_states,
    keeps_documents_apart,
    load_causal_lm,
    max_positions,
    require_own_logits,
    without_other_inputs,
)
from pipeline.model.logit_transform import LogitTransform
from pipeline.model.quantization import (
    describe_weights,
    read_quantization,
    require_plain_head_weight,
)
from pipeline.runtime.batch_sizes import COMPARED_ON_CPU
from pipeline.runtime.device import dtype_name, place_rounded
from pipeline.runtime.transfer import to_device
from pipeline.teacher.teacher import Teacher


class HuggingFaceTeacher(Teacher):
    """A model folder, loaded once for inference.

    Args:
        folder: Hugging Face folder with safetensors; no code from it is run.
        vocab_size, dtype, device, head_chunk: see `Teacher`. The dtype of a quantised model is that
            of its activations and of what is not quantised.
        dequantize: convert quantised weights to `dtype`; nothing if there are none.
        what: the model's role, for error messages.

    Raises:
        DecantError: the folder is not a model, its head is smaller than the vocabulary, or its own
            logits differ from the product of its body's output and its head.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        head_chunk: int = COMPARED_ON_CPU,
        dequantize: bool = False,
        what: str = "teacher",
    ) -> None:
        model = load_causal_lm(folder, dtype, what=what, device=device, dequantize=dequantize)
        quantization = read_quantization(folder)
        if quantization is not None:
            require_plain_head_weight(folder, model)
        self._stored = describe_weights(quantization, dequantize=dequantize)
        model = without_other_inputs(model)
        try:
            self.model = place_rounded(model, dtype, device).eval().requires_grad_(False)
        except torch.OutOfMemoryError:
            raise DecantError(
                f"the teacher {folder}, {model.num_parameters() / 1e9:.1f} B parameters, does not "
                f"fit into the memory of {device} in {dtype_name(dtype)}: divide it among devices "
                "by torchrun, or take a quantised one (docs/teachers.md)"
            ) from None
        require_own_logits(folder, self.model)
        self._keeps_apart: bool | None = None  # unknown yet
        head = self.model.get_output_embeddings()
        super().__init__(
            folder,
            head=head.weight,
            bias=getattr(head, "bias", None),
            transform=LogitTransform.of_config(self.model.config),
            vocab_size=vocab_size,
            dtype=dtype,
            device=device,
            max_seq_len=max_positions(self.model.config),
            head_chunk=head_chunk,
        )

    @property
    def num_parameters(self) -> int:
        return int(self.model.num_parameters())

    def describe(self) -> str:
        return self._described(self.model.config.model_type, self.device.type, self._stored)

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        if doc_ids is None:
            return body_states(self.model, to_device(tokens, self.device))
        if self._keeps_apart is None:
            self._keeps_apart = keeps_documents_apart(self.model, self.vocab_size)
        if not self._keeps_apart:
            raise mixes_documents(self.model.config.model_type)
        positions = to_device(document_positions(doc_ids), self.device)
        return body_states(self.model, to_device(tokens, self.device), positions)


def mixes_documents(model_type: str) -> DecantError:
    """Return the error for a document mask that the architecture would ignore."""
    return DecantError(
        f"the teacher, a {model_type} model, does not keep documents apart that are packed into "
        "one row: set prepare.document_mask=false, or choose another teacher"
    )
