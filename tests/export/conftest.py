"""Small random models whose rows fill blocks of 32, and tokenizers that llama.cpp has names of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import BLOCKS_OF_32, make_llama, make_model


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, biases, a tokenizer as Qwen2.5's with a chat template."""
    return make_model(tmp_path_factory.mktemp("qwen") / "model", "qwen2", **BLOCKS_OF_32)


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 24, which exceed the hidden size of 64 together, and are normalised."""
    return make_model(
        tmp_path_factory.mktemp("qwen3") / "model", "qwen3", **BLOCKS_OF_32, head_dim=24
    )


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of its own, no biases, a tokenizer as SmolLM2's."""
    return make_llama(tmp_path_factory.mktemp("llama") / "model")
