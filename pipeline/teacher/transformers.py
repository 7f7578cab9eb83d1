"""A Hugging Face causal language model as teacher: hidden states, then the head in chunks.

The full logits of a batch (tokens x vocabulary in float32) never exist. The head is applied to a
few positions at a time, with products accumulated in float32, and each chunk of logits is reduced
at once. Rows of the head without a tokenizer id are left out (Qwen2.5 has 151,936 rows for 151,665
ids).

An architecture is tested for keeping packed documents apart before Decant relies on it
(pipeline/model/huggingface.py says how they are kept apart).

Shapes: B batch, L length, D hidden, V valid vocabulary, K kept ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.model.attention_mask import document_positions
from pipeline.model.folder import teacher_folder
from pipeline.model.huggingface import (
    body_states,
    keeps_documents_apart,
    load_causal_lm,
    max_positions,
    require_own_logits,
    require_plain_head,
)
from pipeline.runtime.device import compute_dtype, dtype_name, inference_dtype, place_rounded
from pipeline.runtime.numerics import matmul_float32
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.topk import TopK


class HuggingFaceTeacher:
    """A model folder, loaded once for inference.

    Args:
        folder: Hugging Face folder with safetensors; no code from it is run.
        vocab_size: V, number of ids that the tokenizer can produce; further rows of the head are
            left out.
        dtype: dtype of weights and activations; logits are always float32. On a CPU, float16
            weights are computed in float32 (pipeline/runtime/device.py).
        head_chunk: number of positions whose logits exist at once; the default suits callers that
            make several copies of a chunk.

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
        head_chunk: int = 64,
    ) -> None:
        model = load_causal_lm(folder, dtype, what="teacher")
        require_plain_head(folder, model.config)
        self.folder = folder
        self.model = place_rounded(model, dtype, device).eval().requires_grad_(False)
        require_own_logits(folder, self.model)
        self.max_seq_len = max_positions(self.model.config)
        self.device = device
        self.dtype = dtype
        self._compute_dtype = compute_dtype(dtype, device)
        self.vocab_size = vocab_size
        self.head_chunk = head_chunk
        self._keeps_apart: bool | None = None  # unknown yet
        head = self.model.get_output_embeddings()
        if len(head.weight) < vocab_size:
            raise DecantError(
                f"{folder} has {len(head.weight)} rows in its head for {vocab_size} tokenizer ids: "
                "tokenizer and model do not belong together"
            )
        weight = head.weight[:vocab_size]
        # matmul_float32 takes float32 factors on CPU; converting once is 10 times cheaper than
        # always.
        self._head = (weight.float() if device.type == "cpu" else weight).T
        self._bias = (
            head.bias[:vocab_size].float() if getattr(head, "bias", None) is not None else None
        )

    def describe(self) -> str:
        """Describe the model, for example "a llama of 134.5 M parameters in float32 on cpu"."""
        return (
            f"a {self.model.config.model_type} of {self.model.num_parameters() / 1e6:.1f} M "
            f"parameters in {dtype_name(self.dtype)} on {self.device.type}"
        )

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Map tokens, int64 [B, L], to final hidden states [B, L, D], as the body computes them.

        Args:
            doc_ids: integers [B, L], the documents to keep apart
            (pipeline/model/attention_mask.py);
                None for plain causal attention over the row.

        Raises:
            DecantError: this architecture cannot keep documents apart, or the rows are longer than
                the teacher can read.
        """
        if self.max_seq_len is not None and tokens.shape[1] > self.max_seq_len:
            raise DecantError(
                f"rows of {tokens.shape[1]:,} tokens are longer than the {self.max_seq_len:,} "
                f"positions of the teacher {self.folder}: set corpus.row_length to that at most, "
                "or choose a teacher with a longer context"
            )
        if doc_ids is None:
            return body_states(self.model, tokens.to(self.device))
        if self._keeps_apart is None:
            self._keeps_apart = keeps_documents_apart(self.model, self.vocab_size)
        if not self._keeps_apart:
            raise DecantError(
                f"the teacher, a {self.model.config.model_type} model, does not keep documents "
                "apart that are packed into one row: set prepare.document_mask=false, or choose "
                "another teacher"
            )
        positions = document_positions(doc_ids).to(self.device)
        return body_states(self.model, tokens.to(self.device), position_ids=positions)

    @torch.no_grad()
    def logits_by_chunk(
        self, tokens: Tensor, doc_ids: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield positions of the flattened batch with their logits, float32 [chunk, V], by chunks.

        The tensor is a work space: the next chunk overwrites it. For doc_ids see `hidden_states`.
        """
        hidden = self.hidden_states(tokens, doc_ids).flatten(0, 1)
        work = torch.empty(min(self.head_chunk, len(hidden)), self.vocab_size, device=self.device)
        for start in range(0, len(hidden), self.head_chunk):
            rows = slice(start, min(start + self.head_chunk, len(hidden)))
            logits = work[: rows.stop - rows.start]
            matmul_float32(hidden[rows], self._head, self._compute_dtype, out=logits)
            if self._bias is not None:
                logits += self._bias
            yield rows, logits

    def top_k(
        self,
        tokens: Tensor,
        k: int,
        temperatures: tuple[float, ...],
        uniforms: Tensor | None = None,
        doc_ids: Tensor | None = None,
    ) -> TopK:
        """Map tokens, int64 [B, L], to TopK [B, L, ...] on the teacher's device.

        Args:
            uniforms: [B, L, M] in [0, 1), which decide the M sampled ids; None samples nothing.
            doc_ids: see `hidden_states`.

        Raises:
            DecantError: the teacher produced a logit that is not finite.
        """
        if uniforms is None:
            uniforms = torch.empty(*tokens.shape, 0)
        chances = uniforms.flatten(0, 1).to(self.device)
        parts = [
            top_k_from_logits(logits, k, temperatures, chances[rows])
            for rows, logits in self.logits_by_chunk(tokens, doc_ids)
        ]
        topk = TopK.cat(parts).map(lambda t: t.view(*tokens.shape, *t.shape[1:]))
        sums = (topk.lse[..., None], topk.entropy[..., None], topk.lse_tau)
        if not bool(torch.isfinite(torch.cat(sums, -1)).all()):
            raise DecantError(
                f"the teacher's logits overflow in {dtype_name(self.dtype)}: set prepare.dtype to "
                "bfloat16 or float32"
            )
        return topk


def teacher_dtype(params: Params, device: torch.device) -> torch.dtype:
    """Return the dtype that prepare.dtype stands for on this device.

    Raises:
        ParamsError: the device has no units for it.
    """
    return inference_dtype(params.prepare.dtype, device, key="prepare.dtype")


def open_teacher(
    params: Params, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> HuggingFaceTeacher:
    """Open the teacher of paths.teacher, its head in chunks of capture.head_chunk positions."""
    return HuggingFaceTeacher(
        teacher_folder(params.paths.teacher),
        vocab_size=vocab_size,
        dtype=dtype,
        device=device,
        head_chunk=params.capture.head_chunk,
    )
