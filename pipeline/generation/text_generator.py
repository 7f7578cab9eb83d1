"""Generate text with a student and its tokenizer, for batches of prompts, streams and chats.

    generator = TextGenerator(Path("cache/runs/student/model"))
    generator.generate(["def main():", "import "], GenerationSettings(max_new_tokens=32))
    for piece in generator.stream("def main():"):
        print(piece, end="", flush=True)

Settings that the user leaves at None come from the folder: `generation_config.json` says whether to
sample (`do_sample`), with which temperature, top_k, top_p and repetition_penalty, and which ids end
a text. Without that file decoding is greedy, and a text ends at the eos_token_id of `config.json`
or, if there is none, at the tokenizer's eos token and at <|endoftext|>, which separates the
documents that a student was trained on. (By default Hugging Face keeps only the 50 most probable
ids. Decant does not, since a limit that nobody wrote down is a surprise.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DecantError, ParamsError
from pipeline.generation.sampling import GenerationSettings, decode_steps, generate_ids
from pipeline.io.files import require_regular_files
from pipeline.model.tokenizer import load_tokenizer
from pipeline.model.weights import load_student
from pipeline.runtime.console import progress
from pipeline.runtime.device import place_rounded


class PieceDecoder:
    """A decoder from tokens to text, one by one, that never splits a character.

    A byte-level token may hold a part of a UTF-8 character, which decodes to U+FFFD; text that ends
    in this way is held back until the character is complete. Some tokenizers decode a token
    differently depending on the token before it, so each piece is the text by which a short window
    of tokens grows with the new token.

    Args:
        control_tokens: whether tokens such as <|im_start|> count as text.
    """

    def __init__(self, tokenizer: Any, *, control_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._window: list[int] = []  # tokens of the last piece, then those not yet returned
        self._given = 0  # number of tokens in the window that were already returned

    def push(self, token: int) -> str:
        """Add a token; return the text that it completes, empty while a character is incomplete."""
        self._window.append(token)
        return self._take(whole_characters=True)

    def peek(self, token: int) -> str:
        """Return what `push` would, with U+FFFD for incomplete characters; do not add the token."""
        before = self._decode(self._window[: self._given])
        return self._decode([*self._window, token])[len(before) :]

    def flush(self) -> str:
        """Return the remaining text at the end, complete or not."""
        return self._take(whole_characters=False)

    def _take(self, *, whole_characters: bool) -> str:
        before = self._decode(self._window[: self._given])
        after = self._decode(self._window)
        if whole_characters and after.endswith("\ufffd"):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=not self._control_tokens)
        return text


_CPU = torch.device("cpu")


@dataclass
class Counts:
    """A generator's totals so far; tokens exclude padding."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0


class TextGenerator:
    """A student and its tokenizer, from a Hugging Face folder of type qwen2, qwen3 or llama.

    Args:
        folder: model folder, written by Decant or Hugging Face.
        device: device on which the model runs.
        dtype: number format in which the model runs. In float32 a text does not depend on the batch
            in which it is generated; in half formats rounding may decide a close choice.

    Attributes:
        counts: tokens and seconds over all calls.

    Raises:
        DecantError: the folder does not contain such a model, or has no tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device = _CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.dtype = dtype
        self.student = place_rounded(load_student(folder).eval(), dtype, device)
        self.defaults = folder_defaults(folder, self.tokenizer)
        self.counts = Counts()

    def generate(
        self,
        prompts: Sequence[str],
        settings: GenerationSettings | None = None,
        *,
        batch_rows: int = 8,
    ) -> list[str]:
        """Continue each prompt, without special tokens, `batch_rows` at a time.

        Raises:
            ParamsError: a prompt is empty, or with the new tokens too long for the model.
        """
        settings = self.fill(settings or GenerationSettings())
        encoded = [
            self.encode(prompt, settings, f"prompt {i + 1}") for i, prompt in enumerate(prompts)
        ]
        draws = torch.Generator(self.student.head_weight.device).manual_seed(settings.seed)
        texts: list[str] = []
        starts = range(0, len(encoded), batch_rows)
        for first in progress(starts, what="generate", unit="batch"):
            started = time.perf_counter()
            rows = encoded[first : first + batch_rows]
            new = generate_ids(self.student, rows, settings, draws)
            self._count(rows, sum(map(len, new)), started)
            texts += [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        return texts

    def stream(self, prompt: str, settings: GenerationSettings | None = None) -> Iterator[str]:
        """Continue a prompt, and yield pieces of whole characters as they are generated.

        Raises:
            ParamsError: see `generate`; raised before the first piece.
        """
        settings = self.fill(settings or GenerationSettings())
        return self._pieces(self.encode(prompt, settings, "the prompt"), settings)

    def chat(
        self, messages: Sequence[Mapping[str, str]], settings: GenerationSettings | None = None
    ) -> Iterator[str]:
        """Yield the assistant's reply to a conversation in pieces.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text}, in order.

        Raises:
            DecantError: the folder has no chat template, or the template refuses the messages.
            ParamsError: the conversation is too long.
        """
        settings = self.fill(settings or GenerationSettings())
        text = self.apply_chat_template(messages)
        ids = self.encode(text, settings, "the conversation", add_special_tokens=False)
        return self._pieces(ids, settings)

    def require_chat_template(self) -> None:
        """Raise DecantError if the folder has no chat template."""
        if not self.tokenizer.chat_template:
            raise DecantError(
                f"{self.folder} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json): give a plain prompt, or a model trained for chats"
            )

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render the conversation as the model reads it, up to the beginning of its reply."""
        self.require_chat_template()
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program and may raise anything
            raise DecantError(
                f"the chat template of {self.folder} refuses the conversation ({error})"
            ) from error
        return text

    def encode(
        self, text: str, settings: GenerationSettings, what: str, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Tokenize a prompt, and check that it fits the model; `what` names it in errors.

        Special tokens are those that the tokenizer adds around text (a bos, for some models); a
        chat template writes its own.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        if not text or not ids:
            raise ParamsError(f"{what} is empty: give at least one character")
        config, most = self.student.config, settings.max_new_tokens
        if len(ids) + most > config.max_seq_len:
            raise ParamsError(
                f"{what} has {len(ids)} tokens, which with max_new_tokens={most} exceeds the "
                f"model's context of {config.max_seq_len}: shorten it, or lower max_new_tokens"
            )
        if max(ids) >= config.vocab_size:
            raise DecantError(
                f"the tokenizer of {self.folder} gives id {max(ids)}, but the model has "
                f"{config.vocab_size} embedding rows: they do not belong together"
            )
        return ids

    def fill(self, settings: GenerationSettings) -> GenerationSettings:
        """Return the settings, with the folder's values in place of None."""
        missing = {k: v for k, v in self.defaults.items() if getattr(settings, k) is None}
        return replace(settings, **missing)

    def _pieces(self, ids: list[int], settings: GenerationSettings) -> Iterator[str]:
        decoder = PieceDecoder(self.tokenizer)
        started, new_tokens = time.perf_counter(), 0
        try:
            for step in decode_steps(self.student, [ids], settings):
                new_tokens += 1
                if piece := decoder.push(int(step)):
                    yield piece
            if piece := decoder.flush():
                yield piece
        finally:  # a reply may be cut short
            self._count([ids], new_tokens, started)

    def _count(self, prompts: Sequence[Sequence[int]], new_tokens: int, started: float) -> None:
        self.counts.prompt_tokens += sum(map(len, prompts))
        self.counts.new_tokens += new_tokens
        self.counts.seconds += time.perf_counter() - started


def default_eos_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end a text if the folder names none; see the module's docstring."""
    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|endoftext|>")}
    return sorted(ids - {None})


def folder_defaults(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Return the value for each setting that is None; see the module's docstring.

    Raises:
        DecantError: a file of the folder is damaged, or holds a value out of bounds.
    """
    said = _read_optional(folder / "generation_config.json")
    eos = said.get("eos_token_id")
    if eos is None:
        eos = _read_optional(folder / "config.json").get("eos_token_id")
    if eos is None:
        eos = default_eos_ids(tokenizer)
    said = {name: value for name, value in said.items() if value is not None}
    try:
        defaults: dict[str, Any] = {
            "temperature": said.get("temperature", 1.0) if said.get("do_sample") else 0.0,
            "top_k": said.get("top_k", 0),
            "top_p": said.get("top_p", 1.0),
            "repetition_penalty": said.get("repetition_penalty", 1.0),
            "eos_ids": (eos,) if isinstance(eos, int) else tuple(sorted(map(int, eos))),
        }
        GenerationSettings(**defaults)
    except (TypeError, ValueError) as error:
        raise DecantError(
            f"{folder / 'generation_config.json'} is refused ({error}): fix or remove it"
        ) from None
    return defaults


def _read_optional(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist."""
    require_regular_files([file])
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DecantError(f"{file} cannot be read as JSON ({error}): fix or remove it") from None
    if not isinstance(content, dict):
        raise DecantError(f"{file} must hold a JSON object: fix or remove it")
    return content
