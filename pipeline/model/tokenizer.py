"""A folder's tokenizer: what its tokenizer.json says, and a folder that transformers opens so too.

`AutoTokenizer` chooses a class by `tokenizer_class` in tokenizer_config.json or by `model_type` in
config.json, and some classes take vocabulary and merges of tokenizer.json alone and split text in
their own way: the folder of a `qwen2` model is opened as Qwen2's tokenizer whatever its files say.
Tokens are ids that a model was trained on, so Decant reads tokenizer.json itself. A folder that it
writes is one of which AutoTokenizer makes the same tokens: a difference in a sample of text, or in
the texts of its own tokens, is refused.

tokenizer_config.json still says which tokens are special, and gives the chat template.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import DecantError
from pipeline.model.folder import TOKENIZER_FILES, copy_files, require_regular_folder
from pipeline.runtime.optional import import_transformers

LARGEST_ID = 10_000_000
"""No tokenizer has as many ids: a larger one is a damaged file, and would be allocated by."""

_TOKENS_COMPARED = 10_000  # evenly spaced over the vocabulary: more take seconds
_PLAIN_CLASS = "PreTrainedTokenizerFast"  # what older transformers call TokenizersBackend
_SAMPLE = """Don't stop: we'll see, THEY'RE here; it's 3.14159, 2024 or 1,234,567.
\tif (x != 0) {\n        return foo_bar[i++] || "a\\tb";\r\n    }\n\n\n# end   of  file   \n
Crème brûlée cafe\u0301, naïve \u212bngström \ufb01ne, Größe; 東京タワー、한국어, Привет, שלום, मानक
https://example.org/a?b=c&d=%20 e-mail@x.io <tag attr='v'/> 🙂👩\u200d👧 \u00bd \u00b2 \u2163
\u00a0\u2003\u200b…“”  \n \n  ok"""


class TokenizerClassError(DecantError):
    """transformers opens a folder with another tokenizer than its tokenizer.json describes."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local Hugging Face folder, as its tokenizer.json describes it.

    No code of the folder is run.

    Raises:
        DecantError: there is none, or it is damaged.
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
    """The tokenizer that `AutoTokenizer` makes of a folder: what other programs will use.

    Raises:
        DecantError: as `load_tokenizer`.
    """
    return _open(folder, import_transformers().AutoTokenizer)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer into a folder that holds a config.json, so that transformers keeps to it.

    Where the class that tokenizer_config.json names would make other tokens, it is replaced.

    Raises:
        TokenizerClassError: the model's type decides on another tokenizer in any case.
        DecantError: there is no tokenizer, or it cannot be copied (`files_to_copy`).
    """
    copy_files(source, TOKENIZER_FILES, folder)
    load_tokenizer(folder)  # a damaged one is no matter of its class
    with suppress(DecantError):
        require_kept(folder)
        return
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content.pop("auto_map", None)  # code of the folder, which is not copied
    content["tokenizer_class"] = _PLAIN_CLASS
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    require_kept(folder)


def require_kept(folder: Path) -> None:
    """Refuse a folder of which AutoTokenizer makes another tokenizer than its tokenizer.json.

    Raises:
        TokenizerClassError: it does.
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
    except BaseException as error:  # damage shows as errors of several libraries
        # A panic of the Rust library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise DecantError(
            f"the tokenizer of {folder} cannot be read ({reason}): download the folder's files "
            "again"
        ) from error


def _same_tokens(one: Any, two: Any) -> bool:
    """Whether two tokenizers make the same ids of the sample and of the texts of their tokens."""
    vocabulary = one.get_vocab()
    if vocabulary != two.get_vocab():
        return False
    added = " ".join(f"a{token}b {token}" for token in one.get_added_vocab())
    numbers = sorted(vocabulary.values())[:: 1 + len(vocabulary) // _TOKENS_COMPARED]
    texts = [_SAMPLE, added, " ".join(one.batch_decode([[number] for number in numbers]))]
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (one, two)]
    return bool(ids[0] == ids[1])
