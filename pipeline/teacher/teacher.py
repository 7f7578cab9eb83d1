"""A teacher: final hidden states from an engine, then the head in chunks.

An engine (pipeline/teacher/engines.py) maps token rows to hidden states. Everything after that is
the same for all engines and is done here, because no engine returns the exact normalisers, the
entropy or the sampled ids of a position. The full logits of a batch (tokens x vocabulary in
float32) never exist: the head is applied to a few positions at a time, with products accumulated
in float32, and each chunk of logits is reduced at once. Rows of the head without a tokenizer id
are left out (Qwen2.5 has 151,936 rows for 151,665 ids).

Shapes: B batch, L length, D hidden, V valid vocabulary, K kept ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import DecantError
from pipeline.model.logit_transform import LogitTransform
from pipeline.runtime.device import compute_dtype, dtype_name
from pipeline.runtime.numerics import as_factor, matmul_float32
from pipeline.runtime.transfer import begin_copy_to_host, to_device
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.selection import keep_highest_entropy
from pipeline.targets.topk import TopK

_TILE = 64  # columns of a product, a multiple of what any kernel writes at once


class Teacher(ABC):
    """A causal language model that is only read.

    Args:
        folder: Hugging Face folder of the model.
        head: the head's matrix, [at least V, D], on any device.
        bias: the head's bias, [at least V], or None.
        transform: what the model does to its logits after the head.
        vocab_size: V, number of ids that the tokenizer can produce; further rows of the head are
            left out.
        dtype: dtype of weights and activations; logits are always float32. On a CPU, float16
            weights are computed in float32 (pipeline/runtime/device.py).
        device: device of the head, and of everything that is returned.
        max_seq_len: longest row that the model can read; None if there is no limit.
        head_chunk: number of positions whose logits exist at once.

    Raises:
        DecantError: the head is smaller than the vocabulary.
    """

    def __init__(
        self,
        folder: Path,
        *,
        head: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_seq_len: int | None,
        head_chunk: int,
    ) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.device = device
        self.max_seq_len = max_seq_len
        self.head_chunk = head_chunk
        self._transform = transform
        self._compute_dtype = compute_dtype(dtype, device)
        if len(head) < vocab_size:
            raise DecantError(
                f"{folder} has {len(head)} rows in its head for {vocab_size} tokenizer ids: "
                "tokenizer and model do not belong together"
            )
        # Once, since converting the head for each chunk of positions costs 10 times the product.
        self._head = as_factor(_whole_tiles(head, vocab_size, device), self._compute_dtype).T
        self._bias = None if bias is None else bias[:vocab_size].to(device).float()

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Number of the model's parameters; tied ones count once."""

    @abstractmethod
    def describe(self) -> str:
        """Describe the model, for example "a llama of 134.5 M parameters in float32 on cpu"."""

    def _described(self, model_type: str, where: str, stored: str = "") -> str:
        """Return the text of `describe`.

        Args:
            where: what runs the model.
            stored: how its weights are quantised, as `describe_weights` says it.
        """
        return (
            f"a {model_type} of {self.num_parameters / 1e6:.1f} M parameters"
            f"{stored}{',' if stored else ''} in {dtype_name(self.dtype)} on {where}"
        )

    @abstractmethod
    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Map rows that are not too long to final hidden states; see `hidden_states`."""

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Map tokens, int64 [B, L], to final hidden states [B, L, D], as the body computes them.

        Args:
            doc_ids: integers [B, L] on the CPU, the documents to keep apart (see
                pipeline/model/attention_mask.py); None for plain causal attention over the row.

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
        return self.states(tokens, doc_ids)

    @torch.no_grad()
    def logits_by_chunk(
        self, tokens: Tensor, doc_ids: Tensor | None = None, positions: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield positions of the flattened batch with their logits, float32 [chunk, V], by chunks.

        The tensor is a work space: the next chunk overwrites it. For doc_ids see `hidden_states`.

        Args:
            positions: int64 [n] on the CPU, the positions of the flattened batch that are wanted;
                slices count these. None: all.
        """
        hidden = self.hidden_states(tokens, doc_ids).flatten(0, 1)
        if positions is not None:
            hidden = hidden.index_select(0, to_device(positions, hidden.device))
        columns = self._head.shape[1]
        work = torch.empty(min(self.head_chunk, len(hidden)), columns, device=self.device)
        for start in range(0, max(1, len(hidden)), self.head_chunk):  # one chunk if there are none
            rows = slice(start, min(start + self.head_chunk, len(hidden)))
            out = work[: rows.stop - rows.start]
            states = as_factor(hidden[rows], self._compute_dtype)
            matmul_float32(states, self._head, self._compute_dtype, out=out, prepared=True)
            logits = out[:, : self.vocab_size]
            if self._bias is not None:
                logits += self._bias
            yield rows, self._transform.apply_(logits)

    def top_k(
        self,
        tokens: Tensor,
        k: int,
        temperatures: tuple[float, ...],
        uniforms: Tensor | None = None,
        doc_ids: Tensor | None = None,
        *,
        top_p: float | None = None,
        wanted: Tensor | None = None,
        entropy_quantile: float = 0.0,
    ) -> TopK:
        """Map tokens, int64 [B, L], to TopK [B, L, ...] on the teacher's device.

        Args:
            uniforms: [B, L, M] in [0, 1), which decide the M sampled ids; None samples nothing.
            doc_ids: see `hidden_states`.
            top_p: see `top_k_from_logits`.
            wanted: bool [B, L] on the CPU, the positions that get a target; None: all. The head
                does not run on the others.
            entropy_quantile: see `keep_highest_entropy`.

        Raises:
            DecantError: the teacher produced a logit that is not finite.
        """
        positions = _positions(wanted)
        topk = self._reduced(tokens, k, temperatures, uniforms, doc_ids, top_p, positions)
        return self._finished(topk, tokens.shape, positions, entropy_quantile)

    def begin_top_k(
        self,
        tokens: Tensor,
        k: int,
        temperatures: tuple[float, ...],
        uniforms: Tensor | None = None,
        doc_ids: Tensor | None = None,
        *,
        top_p: float | None = None,
        wanted: Tensor | None = None,
        entropy_quantile: float = 0.0,
    ) -> Callable[[], TopK]:
        """Begin `top_k`; return a function that waits for its result, in CPU memory.

        On a GPU this returns when the work is queued, so that the caller can queue more before it
        waits. Errors are those of `top_k`, raised by either call.
        """
        positions = _positions(wanted)
        topk = self._reduced(tokens, k, temperatures, uniforms, doc_ids, top_p, positions)
        topk = topk.map(begin_copy_to_host)
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()

        def result() -> TopK:
            if done is not None:
                done.synchronize()
            return self._finished(topk, tokens.shape, positions, entropy_quantile)

        return result

    def _reduced(
        self,
        tokens: Tensor,
        k: int,
        temperatures: tuple[float, ...],
        uniforms: Tensor | None,
        doc_ids: Tensor | None,
        top_p: float | None,
        positions: Tensor | None,
    ) -> TopK:
        """Return TopK [n, ...] of these positions, or of all."""
        if uniforms is None:
            uniforms = torch.empty(*tokens.shape, 0)
        uniforms = uniforms.flatten(0, 1)
        if positions is not None:
            uniforms = uniforms[positions]
        chances = to_device(uniforms, self.device)
        return TopK.cat(
            [
                top_k_from_logits(logits, k, temperatures, chances[rows], top_p)
                for rows, logits in self.logits_by_chunk(tokens, doc_ids, positions)
            ]
        )

    def _finished(
        self, topk: TopK, shape: torch.Size, positions: Tensor | None, entropy_quantile: float
    ) -> TopK:
        """Check what `_reduced` returned, give it the shape [B, L], and choose its positions."""
        self.require_finite(topk)
        if positions is None:
            topk = topk.map(lambda t: t.view(*shape, *t.shape[1:]))
        else:
            topk = topk.spread(to_device(positions, topk.lse.device), shape)
        return keep_highest_entropy(topk, entropy_quantile)

    def require_finite(self, topk: TopK) -> None:
        """Refuse a reduction of logits that are not finite.

        Raises:
            DecantError: one of them is not.
        """
        sums = (topk.lse[..., None], topk.entropy[..., None], topk.lse_tau)
        if not bool(torch.isfinite(torch.cat(sums, -1)).all()):
            raise DecantError(
                f"the teacher's logits overflow in {dtype_name(self.dtype)}: set prepare.dtype to "
                "bfloat16 or float32"
            )


def _positions(wanted: Tensor | None) -> Tensor | None:
    """Return the places of True in the flattened tensor, int64 [n]; None if all are."""
    if wanted is None or bool(wanted.all()):
        return None
    return wanted.flatten().nonzero()[:, 0]


def _whole_tiles(head: Tensor, vocab_size: int, device: torch.device) -> Tensor:
    """Return the head's rows of the valid ids; on a GPU with more, up to whole tiles.

    A product that writes rows of 151,665 numbers cannot use the fast kernels, which write 16 bytes
    at a time: on an H100 it took most of a small teacher's capture.
    """
    if device.type != "cuda":
        return head[:vocab_size].to(device)
    wanted = -(-vocab_size // _TILE) * _TILE
    rows = head[:wanted].to(device)
    if len(rows) == wanted:  # a view of the model's own head, if it is on the device
        return rows
    return torch.nn.functional.pad(rows, (0, 0, 0, wanted - len(rows)))
