"""What training, evaluation and saving ask of a student, whoever wrote the model.

Two classes provide it: `StudentModel` (pipeline/model/student.py) for the architectures it reads,
and `HuggingFaceStudent` (pipeline/model/hugging_face.py) for every other causal language model.
It is an abstract module rather than a Protocol, since optimizers, checkpoints and sharding take an
`nn.Module`, and Python cannot say "a module with these methods" otherwise.

Shapes: B batch, L length, D hidden, V vocabulary rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Student(nn.Module, ABC):
    """A causal language model in two parts: hidden states, and the matrix that makes logits."""

    @abstractmethod
    def hidden_states(self, tokens: Tensor, doc_ids: Tensor | None = None) -> Tensor:
        """Tokens int64 [B, L] -> final normalised hidden states [B, L, D].

        Args:
            doc_ids: integers [B, L]; positions attend within their own document only, and are
                counted from its start. None: the row is one document.
        """

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """[V, D]: logits are hidden states times its transpose, and nothing else."""

    @property
    @abstractmethod
    def max_seq_len(self) -> int | None:
        """Longest row it can take; None where there is no limit."""

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The module whose parameters have Hugging Face's names."""

    @property
    def vocab_size(self) -> int:
        """V, rows of the head; may exceed the number of token ids."""
        return len(self.head_weight)

    def count_parameters(self, *, trained_only: bool = False) -> int:
        """Number of parameters, a tied matrix counted once."""
        counted = (p for p in self.parameters() if p.requires_grad or not trained_only)
        return sum(parameter.numel() for parameter in counted)
