"""A GGUF file in llama.cpp, by the wheel xllamacpp: greedy tokens and token ids of texts.

The wheel embeds llama-server. It runs in a process of its own (llama_server.py) that listens on a
free port of this machine alone, and goes when this one does.
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

_PATIENCE = 600.0  # seconds for one answer


def has_llama_cpp() -> bool:
    """Whether the wheel is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """llama.cpp with one model, on the CPU, arithmetic as exact as its options allow.

    Args:
        file: GGUF. context: tokens of the longest text, prompt included.

    Raises:
        DecantError: llama.cpp does not load the file; its own words are quoted.
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
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
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
        """Greedy continuations of token ids; one may end early, by a token that ends texts."""
        options = {
            "n_predict": new_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "repeat_penalty": 1.0,
            "return_tokens": True,
            "cache_prompt": False,  # a batch of another size is rounded otherwise
        }
        return [
            self._ask("/completion", {"prompt": list(ids), **options})["tokens"] for ids in texts
        ]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it recognised, none put around it."""
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
        """What the process said last, and how it ended if it did."""
        try:
            ended = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            ended = None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = next((line.strip() for line in reversed(lines) if " E " in line), None)
        said = said or (lines[-1].strip() if lines else "it said nothing")
        return said if ended is None else f"{said}; status {ended}"
