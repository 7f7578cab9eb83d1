"""Prompts from a file, one per line."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import ParamsError


def read_prompts(file: Path) -> list[str]:
    """Read one prompt per line, or the "prompt" of each line of a .jsonl file; skip blank lines.

    Raises:
        ParamsError: the file does not exist, has no prompts, or has a line without one; the message
            gives the line's number.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # U+2028 and the like end no line
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(
            f"{file} cannot be read as text ({error}): name it by --prompts"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ParamsError(f"{file} holds no prompts: write one per line")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{file} line {number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ParamsError(f'{where} is not of the form {{"prompt": "text"}}: fix the line')
    return prompt
