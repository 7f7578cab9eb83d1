"""A GGUF file run by llama.cpp, from the wheel xllamacpp: greedy tokens and token ids of texts.

The wheel embeds llama-server. It runs in its own process (llama_server.py), which listens on a free
port of this machine only and ends with this process.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import torch

from pipeline.errors import DecantError

_PATIENCE = 600.0  # seconds to wait for one answer


def has_llama_cpp() -> bool:
    """Return whether the wheel is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """llama.cpp with one model, on the CPU, with arithmetic as exact as its options allow.

    Args:
        file: a GGUF file.
        context: number of tokens of the longest text, including the prompt.

    Raises:
        DecantError: llama.cpp cannot load the file; the message quotes its own.
    """

    def __init__(self, file: Path, *, context: int) -> None:
        self._file = file
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (see close)
        script = Path(__file__).with_name("llama_server.py")
        command = [sys.executable, "-P", str(script), str(file), str(context)]
        self._process = subprocess.Popen(
            [*command, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C goes to this process, which then ends the other
        )
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            assert self._process.stdout is not None
            self._address = self._process.stdout.readline().strip()
            if not self._address:
                raise DecantError(f"llama.cpp does not load {file} ({self._last_words()})")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def generate(self, texts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Continue token ids greedily; a continuation may end early, at an end-of-text token."""
        options = {
            "n_predict": new_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "repeat_penalty": 1.0,
            "return_tokens": True,
            "cache_prompt": False,  # another batch size would round differently
        }
        return [
            self._ask("/completion", {"prompt": list(ids), **options})["tokens"] for ids in texts
        ]

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens in it are recognised, none are added."""
        options = {"add_special": False, "parse_special": True}
        ids: list[int] = self._ask("/tokenize", {"content": text, **options})["tokens"]
        return ids

    def _ask(self, path: str, question: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._address + path,
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=_PATIENCE) as answer:
                return json.load(answer)
        except OSError as error:
            raise DecantError(
                f"llama.cpp failed on {self._file} ({error}; {self._last_words()})"
            ) from None

    def _last_words(self) -> str:
        """Return the last error message of the process, and its exit status if it has ended."""
        try:
            ended = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            ended = None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = next((line.strip() for line in reversed(lines) if " E " in line), None)
        said = said or (lines[-1].strip() if lines else "it said nothing")
        return said if ended is None else f"{said}; status {ended}"
