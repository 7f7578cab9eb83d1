"""Generate text with a student or a teacher: `python stages/generate.py --prompt "def main():"`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli import stage
from pipeline.errors import ParamsError, printable
from pipeline.generation.prompts import read_prompts
from pipeline.io.files import write_text

if TYPE_CHECKING:
    from pipeline.config.params import Params
    from pipeline.generation.sampling import GenerationSettings
    from pipeline.generation.text_generator import TextGenerator


@stage
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Hugging Face folder of type qwen2, qwen3 or llama.  [default: paths.runs/student/model]",
)
@click.option("--prompt", help="Continue this text.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help='Continue each line of a text file, or each "prompt" of a .jsonl file.',
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="With --prompts: write jsonl of prompt and text here instead of printing.",
)
def main(
    params: Params,
    model: Path | None,
    prompt: str | None,
    prompts: Path | None,
    output: Path | None,
) -> None:
    """Continue a prompt, a file of prompts, or chat.

    With neither --prompt nor --prompts it chats by the model's chat template: a line is a message,
    /reset forgets the conversation, Ctrl-C ends a reply, Ctrl-D the chat. Reads generate.*, seed
    and a model folder of paths.runs or --model; writes only what --output names. Run by hand; no
    other stage depends on it.
    """
    from pipeline.generation.sampling import GenerationSettings
    from pipeline.generation.text_generator import TextGenerator
    from pipeline.model.model_dtype import model_dtype
    from pipeline.model.named_models import model_folder
    from pipeline.runtime.device import dtype_name, pick_device

    if prompt is not None and prompts is not None:
        raise ParamsError("--prompt and --prompts exclude each other: give one of them")
    if output is not None and prompts is None:
        raise ParamsError("--output needs --prompts: a single text is printed")
    texts = None if prompts is None else read_prompts(prompts)
    folder = model_folder(params.paths.runs, "student", model)
    device = pick_device(params.device)
    dtype = model_dtype(params.generate.dtype, folder, device, key="generate.dtype")
    generator = TextGenerator(folder, device=device, dtype=dtype)
    settings = GenerationSettings(
        seed=params.seed, **params.generate.model_dump(exclude={"batch_rows", "dtype"})
    )
    if prompt is not None:
        pieces = generator.stream(prompt, settings)  # refuses before a word is printed
        try:
            for piece in chain([prompt], pieces):
                click.echo(printable(piece), nl=False)
        finally:  # also after a text that Ctrl-C cut short
            click.echo()
    elif texts is not None:
        found = generator.generate(texts, settings, batch_rows=params.generate.batch_rows)
        hand_out(texts, found, output)
    else:
        chat(generator, settings)
    counts = generator.counts
    click.echo(
        f"generate: {counts.new_tokens:,} tokens from {counts.prompt_tokens:,} in "
        f"{counts.seconds:.1f} s, {counts.new_tokens / max(counts.seconds, 1e-9):.1f} tokens/s in "
        f"{dtype_name(dtype)}"
    )


def hand_out(prompts: list[str], texts: list[str], output: Path | None) -> None:
    """Print each prompt with its continuation, or write them as jsonl."""
    if output is None:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
            click.echo(f"--- {number}\n{printable(prompt + text)}")
        return
    pairs = zip(prompts, texts, strict=True)
    lines = [json.dumps({"prompt": p, "text": t}, ensure_ascii=False) for p, t in pairs]
    write_text(output, "\n".join(lines) + "\n")
    click.echo(f"  {len(lines)} texts in {output}")


def chat(generator: TextGenerator, settings: GenerationSettings) -> None:
    """Answer lines of stdin, typed or piped, until it ends; earlier turns are remembered."""
    generator.require_chat_template()
    history: list[dict[str, str]] = []
    for line in messages():
        if line == "/reset":
            history = []
            click.echo("(forgotten)")
            continue
        said = [*history, {"role": "user", "content": line}]
        try:
            pieces = generator.chat(said, settings)
        except ParamsError as error:  # too long: the conversation goes on without it
            click.echo(
                f"error: {printable(str(error))}; /reset starts a new conversation", err=True
            )
            continue
        history = [*said, {"role": "assistant", "content": say_reply(pieces)}]


def messages() -> Iterator[str]:
    """Lines of stdin that are not blank, behind a prompt where a person types them."""
    typed = sys.stdin.isatty()
    if typed:
        click.echo("(a line is a message; /reset, Ctrl-C ends a reply, Ctrl-D ends)")
    while True:
        if typed:
            click.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def say_reply(pieces: Iterator[str]) -> str:
    """Print a stream of text, then a new line; Ctrl-C ends it early. Returns the text."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            click.echo(printable(piece), nl=False)
    except KeyboardInterrupt:
        click.echo(" ...", nl=False)
    click.echo()
    return text


if __name__ == "__main__":
    main()
