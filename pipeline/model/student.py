"""The interface of a student that training, evaluation and saving rely on.

Two classes implement it: `StudentModel` (pipeline/model/decoder.py) for the architectures that it
supports, and `HuggingFaceStudent` (pipeline/model/huggingface.py) for every other causal language
model. It is an abstract module rather than a Protocol because optimizers, checkpoints and sharding
take an `nn.Module`, and Python cannot express "a module with these methods" in another way.

Shapes: B batch, L length, D hidden, V vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from pipeline.model.logit_transform import UNCHANGED, LogitTransform


class Student(nn.Module, ABC):
    """A causal language model in two parts: hidden states, and the matrix that gives logits."""

    @abstractmethod
    def hidden_states(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Map tokens, int64 [B, L], to final normalised hidden states [B, L, D].

        Args:
            doc_ids: integers [B, L] on the CPU; positions attend only within their own document and
                are counted from its start. If None, each row is one document.
        """

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The head's matrix [V, D]; hidden states times its transpose give the logits."""

    @property
    @abstractmethod
    def max_seq_len(self) -> int | None:
        """The length of the longest row that the model can read; None if there is no limit."""

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The module whose parameters have Hugging Face's names."""

    @property
    def logit_transform(self) -> LogitTransform:
        """What the model does to its logits after the head: nothing, by default."""
        return UNCHANGED

    @property
    def vocab_size(self) -> int:
        """V, the number of rows of the head; it may exceed the number of token ids."""
        return len(self.head_weight)

    def count_parameters(self, *, trained_only: bool = False) -> int:
        """Return the number of parameters, counting a tied matrix once."""
        counted = (p for p in self.parameters() if p.requires_grad or not trained_only)
        return sum(parameter.numel() for parameter in counted)
