"""config.json and tokenizer.json as strangers may have them: right, refused, never a surprise."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, GPT2Config

from pipeline.data.vocabulary import read_vocabulary
from pipeline.errors import DecantError
from pipeline.export.gguf_models import require_convertible
from pipeline.model.config_json import describe, embedding_rows, read_config_json
from pipeline.model.folder import copy_files, hash_weights
from pipeline.model.tokenizer import load_tokenizer
from pipeline.model.weights import open_student
from pipeline.teacher.transformers import HuggingFaceTeacher
from tests.models import make_teacher

_TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64),
            "gpt2, 2 layers, hidden 32, 320 vocabulary rows, 0 MB",
        ),
        (
            Gemma3Config(text_config=_TEXT, vision_config=_VISION, mm_tokens_per_image=4),
            "gemma3, 2 layers, hidden 32, 320 vocabulary rows, 0 MB",
        ),
    ],
)
def test_any_causal_language_model_is_described(config: Any, expected: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert describe(tmp_path) == expected
    assert embedding_rows(tmp_path) == 320
    raw = json.loads((tmp_path / "config.json").read_text())
    for values in (raw, raw.get("text_config", {})):
        for key in ("n_layer", "num_hidden_layers", "layer_types"):
            values.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").unlink()  # which has fewer layers than the class's default
    layers = 12 if raw["model_type"] == "gpt2" else 26
    assert describe(tmp_path).split(", ")[1] == f"{layers} layers"


def changed(**changes: Any) -> Callable[[Path], object]:
    def write(file: Path) -> object:
        return file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return write


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def nested(file: Path) -> object:
    inner: dict[str, Any] = {}
    for _ in range(40):
        inner = {"inner": inner}
    return changed(inner=inner)(file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (changed(hidden_size="64"), r"says hidden_size='64', which must be a whole number"),
        (changed(hidden_size=-64), "says hidden_size=-64"),
        (changed(hidden_size=64.0), r"says hidden_size=64\.0"),
        (changed(hidden_size=2**30), r"says hidden_size=1,073,741,824, and the model has"),
        (changed(vocab_size=10**9), r"says vocab_size=1,000,000,000, and the model has"),
        (changed(intermediate_size=10**9), r"says intermediate_size=1,000,000,000"),
        (changed(num_attention_heads=10**9), "says num_attention_heads="),
        (changed(num_hidden_layers=10**7), r"=10,000,000, and the model numbers 4 at most"),
        (changed(max_position_embeddings=2**40), "says max_position_embeddings="),
        (changed(rms_norm_eps=1e300), r"says rms_norm_eps=1e\+300, which must be a number"),
        (changed(rms_norm_eps="1e-6"), "says rms_norm_eps='1e-6'"),
        (changed(tie_word_embeddings="false"), "says tie_word_embeddings='false'"),
        (changed(rope_parameters=[1]), r"says rope_parameters=\[1\], which must be an object"),
        (changed(rope_parameters={"rope_theta": "a"}), r"says rope_parameters\.rope_theta='a'"),
        (nested, "is nested deeper than 16 levels"),
        (lambda file: file.write_text('{"a":' * 100_000), "cannot be read"),
        (lambda file: file.write_text("9" * 5000), "cannot be read"),
        (lambda file: file.write_bytes(b"\xff{}"), "cannot be read"),
        (lambda file: file.write_text(" " * (2**24 + 1)), "has 16,777,217 bytes"),
        (pipe, "is not a regular file"),
    ],
)
def test_what_no_model_has_is_refused_before_anything_is_built(
    damage: Callable[[Path], object], words: str, teacher_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "model")
    damage(folder / "config.json")
    for use in (read_config_json, describe, open_student, require_convertible, embedding_rows):
        with pytest.raises(DecantError, match=words) as caught:
            use(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("tokenizer.json", ["load_tokenizer", "read_vocabulary", "copy_files"]),
        ("generation_config.json", ["open_teacher", "copy_files"]),
        ("model.safetensors", ["open_teacher", "open_student", "hash_weights", "copy_files"]),
    ],
)
def test_pipes_of_a_folder_are_not_opened(
    name: str, uses: list[str], teacher_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "model")
    pipe(folder / name)
    known: dict[str, Callable[[Path], object]] = {
        "load_tokenizer": load_tokenizer,
        "read_vocabulary": read_vocabulary,
        "open_teacher": open_teacher,
        "open_student": open_student,
        "hash_weights": hash_weights,
        "copy_files": lambda folder: copy_files(folder, ["*"], tmp_path),
    }
    for use in uses:
        with pytest.raises(DecantError, match=rf"{name} is not a regular file"):
            known[use](folder)


def open_teacher(folder: Path) -> HuggingFaceTeacher:
    return HuggingFaceTeacher(
        folder, vocab_size=300, dtype=torch.float32, device=torch.device("cpu")
    )


def test_a_config_of_another_size_than_the_weights(tmp_path: Path) -> None:
    """Each size alone is one that the weights could have."""
    folder = make_teacher(tmp_path)
    changed(intermediate_size=2**10)(folder / "config.json")
    with pytest.raises(DecantError, match=r"describes [\d,]+ weights, and the folder holds"):
        open_student(folder)


_VALUES: list[Any] = [
    "64",
    "",
    -1,
    0,
    1,
    3,
    10**7,
    2**31,
    2**63,
    10**30,
    0.5,
    -1e300,
    1e300,
    float("nan"),
    float("inf"),
    None,
    True,
    [],
    [1, "a", None],
    {},
    {"a": {"b": [1]}},
]


def mutate(content: Any, generator: random.Random) -> Any:
    """One value somewhere replaced, removed, or put deeper."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = generator.choice(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and generator.random() < 0.7:
            place = inner
            continue
        what = generator.random()
        if what < 0.15:
            del place[key]
        elif what < 0.25:
            place[key] = [inner]
        else:
            place[key] = generator.choice(_VALUES)
        return content


def mutated(text: str, generator: random.Random) -> str:
    if generator.random() < 0.1:
        return text[: generator.randrange(len(text))]
    return json.dumps(mutate(json.loads(text), generator))


@contextmanager
def limits(seconds: int, megabytes: int) -> Iterator[None]:
    """Neither a hang nor a large allocation passes: both would end the block with an error."""

    def late(*_: object) -> None:
        raise AssertionError(f"longer than {seconds} s")

    kept = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, kept[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, kept)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < megabytes * 1024


def load_all(folder: Path) -> None:
    """What stages do with a model folder, until one refuses it."""
    describe(folder)
    embedding_rows(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer(["the cat sees"], add_special_tokens=False)
    read_vocabulary(folder)
    tokens = torch.randint(0, 300, (1, 8))
    open_student(folder).eval().hidden_states(tokens)
    open_teacher(folder).hidden_states(tokens)
    require_convertible(folder)


@pytest.mark.parametrize(("name", "count"), [("config.json", 80), ("tokenizer.json", 120)])
def test_mutated_folders_are_loaded_or_refused(
    name: str, count: int, teacher_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "model")
    whole = (folder / name).read_text()
    if name == "config.json":  # more keys than this model needs
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        whole = json.dumps(json.loads(whole) | {"rope_parameters": rope})
    load_all(folder)  # imports, and the allocator's own memory
    refused = 0
    for seed in range(count):
        (folder / name).write_text(mutated(whole, random.Random(seed)))
        with limits(seconds=20, megabytes=200):
            try:
                load_all(folder)
            except DecantError as error:
                refused += "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert refused > count // 3
