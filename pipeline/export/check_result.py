"""The result of an export's check, as check.json holds it and the report reads it back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PathResult:
    """Comparison of one path with the reference; see pipeline/export/check.py."""

    name: str
    tokens: int
    equal_tokens: int
    near_ties: int
    equal_prompts: int
    required: bool
    passed: bool


@dataclass(frozen=True)
class TokenizerResult:
    """Comparison of one tokenizer with the original's, line by line."""

    name: str
    lines: int
    equal_lines: int
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """All comparisons of one export."""

    model: str
    model_sha256: str  # hash of the model that was exported
    reference: str  # name of what the paths are compared with
    prompts: int
    new_tokens: int
    paths: list[PathResult]
    tokenizers: list[TokenizerResult]
    left_out: list[str]  # missing programs, with the remedy

    @property
    def passed(self) -> bool:
        """Whether every required path and every tokenizer passed."""
        return all(path.passed or not path.required for path in self.paths) and all(
            tokenizer.passed for tokenizer in self.tokenizers
        )
