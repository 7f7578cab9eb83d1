"""Read and write a folder's tokenizer so that it always follows its tokenizer.json.

`AutoTokenizer` chooses a class by `tokenizer_class` in tokenizer_config.json or by `model_type` in
config.json. Some classes take only the vocabulary and merges from tokenizer.json and split text in
their own way: the folder of a `qwen2` model is opened as Qwen2's tokenizer whatever its files say.
A model depends on the token ids it was trained on, so Decant reads tokenizer.json itself. In a
folder that Decant writes, AutoTokenizer must give the same tokens: a difference in a sample text,
or in the texts of the vocabulary's own tokens, is refused.

tokenizer_config.json still defines which tokens are special, and provides the chat template.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import DecantError, is_library_error, reason_of
from pipeline.model.folder import TOKENIZER_FILES, copy_files, require_regular_folder
from pipeline.runtime.optional import import_transformers

LARGEST_ID = 10_000_000
"""No tokenizer has this many ids; a larger one is damage and would size an allocation."""

_TOKENS_COMPARED = 10_000  # evenly spaced over the vocabulary; more would take seconds
_PLAIN_CLASS = "PreTrainedTokenizerFast"  # older transformers' name of TokenizersBackend
_SAMPLE = """Don't stop: we'll see, THEY'RE here; it's 3.14159, 2024 or 1,234,567.
\tif (x != 0) {\n        return foo_bar[i++] || "a\\tb";\r\n    }\n\n\n# end   of  file   \n
Crème brûlée cafe\u0301, naïve \u212bngström \ufb01ne, Größe; 東京タワー、한국어, Привет, שלום, मानक
https://example.org/a?b=c&d=%20 e-mail@x.io <tag attr='v'/> 🙂👩\u200d👧 \u00bd \u00b2 \u2163
\u00a0\u2003\u200b…“”  \n \n  ok"""


class TokenizerClassError(DecantError):
    """transformers opens a folder with another tokenizer than its tokenizer.json describes."""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a local Hugging Face folder as its tokenizer.json describes it.

    No code from the folder is run.

    Raises:
        DecantError: the tokenizer is missing or damaged.
    """
    tokenizer = _open(folder, import_transformers().PreTrainedTokenizerFast)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < LARGEST_ID:
        raise DecantError(
            f"the tokenizer of {folder} has {largest:,} for its largest id, which must lie in 0.."
            f"{LARGEST_ID - 1:,}: download the folder's files again"
        )
    return tokenizer


def load_auto_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer by `AutoTokenizer`, as other programs will.

    Raises:
        DecantError: see `load_tokenizer`.
    """
    return _open(folder, import_transformers().AutoTokenizer)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer to a folder that holds a config.json, so that transformers opens it as is.

    If the class named in tokenizer_config.json would give other tokens, it is replaced.

    Raises:
        TokenizerClassError: the model's type selects another tokenizer in any case.
        DecantError: there is no tokenizer, or it cannot be copied (`files_to_copy`).
    """
    copy_files(source, TOKENIZER_FILES, folder)
    load_tokenizer(folder)  # raises for damage, which another class would not repair
    with suppress(DecantError):
        require_kept(folder)
        return
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content.pop("auto_map", None)  # refers to the folder's code, which is not copied
    content["tokenizer_class"] = _PLAIN_CLASS
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    require_kept(folder)


def require_kept(folder: Path) -> None:
    """Refuse a folder whose tokenizer.json differs from what AutoTokenizer opens.

    Raises:
        TokenizerClassError: they give different tokens.
    """
    wanted, found = load_tokenizer(folder), load_auto_tokenizer(folder)
    if not _same_tokens(wanted, found):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        raise TokenizerClassError(
            f"transformers opens the tokenizer of a {kind!r} model as {type(found).__name__}, "
            f"which splits text otherwise than {folder / 'tokenizer.json'}: choose a model whose "
            "own tokenizer this is"
        )


def _open(folder: Path, factory: Any) -> Any:
    if not (folder / "tokenizer.json").exists():
        raise DecantError(f"{folder} holds no tokenizer.json: run stages/fetch.py (or `dvc repro`)")
    require_regular_folder(folder)
    try:
        return factory.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # damage can raise errors of several libraries
        if not is_library_error(error):
            raise
        reason = reason_of(error)
        raise DecantError(
            f"the tokenizer of {folder} cannot be read ({reason}): download the folder's files "
            "again"
        ) from error


def _same_tokens(one: Any, two: Any) -> bool:
    """Return whether two tokenizers give the same ids for the sample and for their own tokens."""
    vocabulary = one.get_vocab()
    if vocabulary != two.get_vocab():
        return False
    added = " ".join(f"a{token}b {token}" for token in one.get_added_vocab())
    numbers = sorted(vocabulary.values())[:: 1 + len(vocabulary) // _TOKENS_COMPARED]
    texts = [_SAMPLE, added, " ".join(one.batch_decode([[number] for number in numbers]))]
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (one, two)]
    return bool(ids[0] == ids[1])
