"""Fixtures: a small random teacher with a real tokenizer, text to train on, params to match.

Everything is made on the spot, so no test needs a network or a downloaded model.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.config.params import Params, load_params
from pipeline.data.corpus import build_corpus
from tests.helpers import capture_all

ROOT = Path(__file__).parents[1]

# Small models gain nothing from threads, and on a busy machine threads that wait for each other
# cost ninefold: one here, and in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
LONG = ("test_stages.py", "test_crash.py", "test_checkpoint.py", "test_distributed.py")
VOCABULARY_ROWS = 320  # more than the tokenizer's 300 ids, as in Qwen2.5


hypothesis.settings.register_profile("decant", deadline=None)  # a busy machine is no defect
hypothesis.settings.load_profile("decant")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files come first, so that no process begins one when the others have finished.
    items.sort(key=lambda item: item.path.name not in LONG)
    conditions = {
        "gpu": (torch.cuda.is_available(), "needs a CUDA GPU"),
        "network": (os.environ.get("DECANT_TEST_NETWORK") == "1", "set DECANT_TEST_NETWORK=1"),
        "slow": (os.environ.get("DECANT_TEST_SLOW") == "1", "set DECANT_TEST_SLOW=1"),
    }
    for item in items:
        for mark, (met, reason) in conditions.items():
            if item.get_closest_marker(mark) and not met:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forkserver() -> multiprocessing.context.ForkServerContext:
    """Children fork from a process that has imported everything: they start in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.logit_cache.test_crash", "pipeline.training.run", "transformers.models.llama"]
    )
    return context


@pytest.fixture(scope="session")
def warm_python() -> Iterator[Path]:
    """A `python` that has imported the large libraries when it starts (see tests/warm.py)."""
    server = ROOT / "tests" / "warm.py"
    with (
        tempfile.TemporaryDirectory(prefix="warm") as name,  # a socket's path has to be short
        socket.socket(socket.AF_UNIX) as listener,
    ):
        address, command = Path(name) / "socket", Path(name) / "python"
        listener.bind(str(address))
        listener.listen()
        client = f"'{sys.executable}' -I -S '{server}' '{address}'"
        command.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
        command.chmod(0o755)
        process = subprocess.Popen(
            [sys.executable, str(server), str(listener.fileno())],
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            | {"HF_HUB_OFFLINE": "1"},
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # which ends when pytest does, however that may be
            start_new_session=True,  # Ctrl-C is for pytest
        )
        listener.close()  # a server that has died is a refused connection
        yield command
        process.communicate()


RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_python(warm_python: Path) -> RunPython:
    """`run_python("stages/x.py", "--words")`: a warm process, by default in the project."""

    def run(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(warm_python), *words],
            cwd=cwd,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def make_sentences(count: int, seed: int) -> list[str]:
    """Documents with enough structure that a small model can learn something."""
    generator = random.Random(seed)
    nouns = ["cat", "teacher", "river", "logit", "student", "cache", "tower"]
    verbs = ["sees", "keeps", "finds", "moves", "reads"]
    documents = []
    for number in range(count):
        words = [f"Note {number}:"]
        for _ in range(generator.randint(5, 40)):
            words.append(f"the {generator.choice(nouns)} {generator.choice(verbs)} a")
            words.append(f"{generator.choice(nouns)}.")
        documents.append(" ".join(words))
    return documents


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents.jsonl."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) for text in make_sentences(120, seed=0)]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_tokenizer(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_sentences(50, seed=1), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    assert len(fast) == vocab_size
    fast.save_pretrained(folder)
    return fast


def make_teacher(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of 4 layers with the tokenizer, saved as a Hugging Face folder."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY_ROWS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.08,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model")


TINY: dict[str, dict[str, Any]] = {
    "corpus": {
        "source": "files",
        "train_tokens": 3000,
        "validation_tokens": 600,
        "row_length": 32,
        "max_document_tokens": None,
    },
    "advise": {"ks": [4, 16, 64]},
    "prepare": {
        "k": 16,
        "dtype": "float32",
        "chunk_rows": 4,
        "shard_rows": 16,
    },
    "capture": {"batch_rows": 4, "head_chunk": 50},
    "verify": {"batches": 20, "noise_batches": 5},
    "student": {"layers": [0, 2]},
    "train": {
        "dtype": "float32",
        "steps": 8,
        "batch_rows": 4,
        "warmup_steps": 2,
        "learning_rate": 0.003,
        "min_learning_rate": 0.0003,
        "shuffle_shards": 2,
        "eval_every": 4,
        "eval_rows": 8,
    },
    "run": {"head_chunk": 50, "checkpoint_every": 2, "min_retained_mass": 0.0},
    "evaluate": {"dtype": "float32", "prompts": ["the cat"], "max_new_tokens": 3},
    "humaneval": {"dtype": "float32", "max_new_tokens": 12, "batch_rows": 2, "workers": 2},
    "export": {"prompts": 4, "prompt_tokens": 8, "max_new_tokens": 4, "lines": 12},
}


def tiny_values(teacher: Path, text: Path, work: Path) -> dict[str, Any]:
    """The project's params.yaml with everything made small and put under `work`."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["device"] = "cpu"
    values["paths"] = {
        name: path and str(work / Path(path).relative_to("cache"))
        for name, path in values["paths"].items()
    }
    values["teacher"]["source"] = "folder"
    values["teacher"]["folder"]["path"] = str(teacher)
    values["corpus"]["files"] = {"paths": [str(text / "*.jsonl")], "column": "text"}
    for section, changes in TINY.items():
        values[section] |= changes
    return values


@pytest.fixture
def tiny_params(teacher_folder: Path, text_folder: Path, tmp_path: Path) -> Params:
    """Params of the tiny pipeline under tmp_path, whose teacher folder is already in place."""
    values = tiny_values(teacher_folder, text_folder, tmp_path / "cache")
    values["paths"]["teacher"] = str(teacher_folder)
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_params(file)


def change(params: Params, **sections: dict[str, Any]) -> Params:
    """Params with some keys of some sections changed, checked again."""
    values = params.model_dump(mode="json")
    for section, changes in sections.items():
        values[section] |= changes
    return Params.model_validate(values)


@pytest.fixture
def tiny_corpus(tiny_params: Params) -> Params:
    """`tiny_params` with the corpus built."""
    build_corpus(tiny_params.corpus, tiny_params.paths.teacher, tiny_params.paths.corpus)
    return tiny_params


@pytest.fixture
def tiny_cache(tiny_corpus: Params) -> Params:
    """`tiny_params` with corpus and cache built."""
    capture_all(tiny_corpus)
    return tiny_corpus
