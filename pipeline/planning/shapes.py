"""The shape of a decoder, and the parameters and operations per token that follow from it.

A shape comes from the params (for a student with random weights), from a local config.json, from
the table of models used in recipes, or from the hub, in that order; the table only saves a request.
Decoders are assumed to be like Qwen2's and Llama's: grouped-query attention and a gated
feed-forward.

Symbols: D hidden, A query width (heads x head size), G key/value width, F intermediate, V rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.names import start_name, teacher_name
from pipeline.config.params import Params
from pipeline.config.source_params import TeacherParams
from pipeline.config.train_params import LoraParams, StudentParams
from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import DecantError, ParamsError
from pipeline.model.config_json import read_config_file, text_config


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder."""

    hidden_size: int  # D
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int  # F
    vocab_size: int  # V, rows of the head
    tied: bool  # embedding and head are one matrix
    qkv_bias: bool

    @property
    def query_size(self) -> int:
        """A, the width of all query heads."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """G, the width of all key/value heads."""
        return self.num_kv_heads * self.head_size

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return inputs and outputs of the linear layers of a block, by Hugging Face's names."""
        d, a, g, f = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        attention = {"q_proj": (d, a), "k_proj": (d, g), "v_proj": (d, g), "o_proj": (a, d)}
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}

    @property
    def body_matrices(self) -> int:
        """Weights of all blocks' linear layers, each used once per token."""
        return self.num_layers * sum(one * two for one, two in self.matrices().values())

    @property
    def head(self) -> int:
        """Weights of the head, V x D."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Number of all parameters; a tied matrix counts once."""
        biases = self.query_size + 2 * self.kv_size if self.qkv_bias else 0
        norms = 2 * self.hidden_size
        embeddings = self.head if self.tied else 2 * self.head
        blocks = self.body_matrices + self.num_layers * (biases + norms)
        return blocks + self.hidden_size + embeddings

    def lora_parameters(self, lora: LoraParams) -> int:
        """Return the number of adapter weights on the named layers: r (inputs + outputs) each."""
        sizes = [sum(size) for name, size in self.matrices().items() if name in lora.targets]
        return self.num_layers * lora.rank * sum(sizes)

    def body_operations(self, row_length: int) -> float:
        """Return the operations per token of a forward through the blocks: 2 N + 4 A L per layer.

        Each weight takes one multiplication and one addition. Attention computes L products with
        keys and L with values, even if a mask drops some (Chowdhery et al. 2022, PaLM, appendix B).
        """
        return 2.0 * self.body_matrices + 4.0 * self.num_layers * self.query_size * row_length

    def forward_operations(self, row_length: int) -> float:
        """Return the operations per token of a forward through blocks and head."""
        return self.body_operations(row_length) + 2.0 * self.head


def _qwen(sizes: tuple[int, int, int, int, int], vocab_size: int, *, tied: bool) -> Shape:
    hidden, layers, heads, kv_heads, intermediate = sizes
    return Shape(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=hidden // heads,
        intermediate_size=intermediate,
        vocab_size=vocab_size,
        tied=tied,
        qkv_bias=True,
    )


def _smollm(sizes: tuple[int, int, int, int, int]) -> Shape:
    return replace(_qwen(sizes, 49_152, tied=True), qkv_bias=False)


KNOWN = {
    "Qwen2.5-0.5B": _qwen((896, 24, 14, 2, 4864), 151_936, tied=True),
    "Qwen2.5-1.5B": _qwen((1536, 28, 12, 2, 8960), 151_936, tied=True),
    "Qwen2.5-3B": _qwen((2048, 36, 16, 2, 11_008), 151_936, tied=True),
    "Qwen2.5-7B": _qwen((3584, 28, 28, 4, 18_944), 152_064, tied=False),
    "Qwen2.5-14B": _qwen((5120, 48, 40, 8, 13_824), 152_064, tied=False),
    "Qwen2.5-32B": _qwen((5120, 64, 40, 8, 27_648), 152_064, tied=False),
    "SmolLM2-135M": _smollm((576, 30, 9, 3, 1536)),
    "SmolLM2-360M": _smollm((960, 32, 15, 5, 2560)),
    "SmolLM2-1.7B": _smollm((2048, 24, 32, 32, 8192)),
}
"""Shapes by name without "-Instruct" and "-Coder", which do not affect the shape."""


def teacher_shape(params: TeacherParams, folder: Path) -> tuple[str, Shape]:
    """Return name and shape of the teacher.

    Args:
        folder: paths.teacher, which holds its config.json once `fetch` has run.

    Raises:
        ParamsError: the shape cannot be found.
    """
    name = teacher_name(params)
    folders = [folder, params.folder.path] if params.source == "folder" else [folder]
    found = _at_hand(name, *folders)
    if found is None and params.source == "hub":
        found = _from_hub(params.hub.id, params.hub.revision)
    if found is None:
        raise ParamsError(
            f"the shape of the teacher {name} is not known here: run stages/fetch.py first, so "
            "that its config.json can be read"
        )
    return name, found


def student_shape(params: StudentParams, teacher: Shape) -> tuple[str, Shape]:
    """Return a description of the student's start, and its shape.

    Raises:
        ParamsError: the checkpoint is neither local nor in the table, or the teacher has fewer
            layers.
    """
    name = start_name(params.model_dump())
    if params.init == "layers":
        if outside := [i for i in params.layers if not 0 <= i < teacher.num_layers]:
            raise ParamsError(
                f"student.layers names layer {outside[0]}, and the teacher's are 0 to "
                f"{teacher.num_layers - 1}: choose among these"
            )
        return name, replace(teacher, num_layers=len(params.layers))
    if params.init == "random":
        assert params.vocab_size != "auto"  # pipeline/config/resolved.py has made it a number
        return name, _from_config(params.model_dump())
    found = params.checkpoint and _at_hand(str(params.checkpoint), params.checkpoint)
    if not found:
        raise ParamsError(
            f"the shape of student.checkpoint={params.checkpoint} is not known here: download the "
            "folder, so that its config.json can be read"
        )
    return name, found


def tokenizer_ids(params: Params, folder: Path, teacher: Shape) -> tuple[int, str]:
    """Return the number of the tokenizer's ids, and a note if student.vocab_size=auto is a guess.

    Without the tokenizer, the teacher's rows are assumed, though the tokenizer may have fewer ids
    (Qwen2.5: 151,665 ids for 151,936 rows).

    Args:
        folder: the teacher's folder, whose tokenizer is counted once `fetch` has run.
    """
    try:
        return max(read_vocabulary(folder).tokens) + 1, ""
    except ValueError:  # no tokenizer that can be read (a DecantError), or one without ids
        uses = params.student.init == "random" and params.student.vocab_size == "auto"
        rows = f"{teacher.vocab_size:,}"
        guess = f", a vocabulary of the teacher's {rows} rows assumed for student.vocab_size=auto"
        return teacher.vocab_size, guess if uses else ""


def _at_hand(name: str, *folders: Path) -> Shape | None:
    """Return the shape in the first folder with a config.json, else the one in the table."""
    for folder in folders:
        if (folder / "config.json").exists():
            return _read(folder / "config.json")
    return known(name)


def known(name: str) -> Shape | None:
    """Return a model's shape by hub id, folder or file name; None if it is not in the table."""
    plain = name.rpartition("/")[2].replace("-Coder", "").replace("-Instruct", "")
    if plain.endswith(".gguf"):
        plain = next((key for key in KNOWN if plain.startswith((f"{key}.", f"{key}-"))), plain)
    return KNOWN.get(plain)


def _from_hub(hub_id: str, revision: str) -> Shape | None:
    from huggingface_hub import hf_hub_download

    try:
        return _read(Path(hf_hub_download(hub_id, "config.json", revision=revision)))
    except DecantError:
        raise
    except Exception:  # HTTP, SSL, offline mode and file errors from several libraries
        return None


def _read(file: Path) -> Shape:
    try:
        return _from_config(text_config(read_config_file(file)))
    except (LookupError, TypeError) as error:
        raise DecantError(
            f"{file} does not give the shape of a decoder ({type(error).__name__}: {error}): plans "
            "are made for models whose config.json has the keys of Qwen2's or Llama's"
        ) from None


def _from_config(raw: Mapping[str, Any]) -> Shape:
    """Read a shape from a config.json, or from the section `student`, with its shorter names."""
    heads = raw.get("num_attention_heads") or raw["num_heads"]
    kv_heads = raw.get("num_key_value_heads") or raw.get("num_kv_heads") or heads
    bias = raw.get("attention_bias", raw.get("model_type") == "qwen2")
    return Shape(
        hidden_size=raw["hidden_size"],
        num_layers=raw.get("num_hidden_layers") or raw["num_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        tied=raw.get("tie_word_embeddings", raw.get("tie_embeddings", False)),
        qkv_bias=bias,
    )
