"""Rollouts: tokens as sampled, whatever the batch, the engine or an interruption, as a corpus."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.cache_params import VllmParams
from pipeline.config.params import Params
from pipeline.config.source_params import RolloutsParams
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.data.packing import PADDING, positions_in_loss
from pipeline.data.vocabulary import require_tokenizer
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.export.card import data_line, teacher_line
from pipeline.export.dataset_card import dataset_card
from pipeline.generation import rollout_models, rollouts
from pipeline.generation.rollout_models import (
    RolloutModel,
    VllmRollouts,
    _OfTransformers,
    _Ours,
    context_of,
)
from pipeline.generation.rollout_prompts import read_rollout_prompts
from pipeline.generation.rollouts import Rollouts, make_rollouts, rollout_uniforms
from pipeline.generation.sampling import GenerationSettings
from pipeline.model.folder import hash_weights
from pipeline.model.tokenizer import load_tokenizer
from pipeline.teacher.vllm_process import VllmProcess
from tests.helpers import capture_all, change, gate, open_cache
from tests.models import CHATML, make_qwen3, make_teacher, make_tokenizer

CPU = torch.device("cpu")
NEW = 12


@pytest.fixture
def params(tiny_params: Params, text_folder: Path) -> Params:
    """Twelve prompts of eight tokens, two rollouts of each."""
    return change(tiny_params, rollouts=small(text_folder))


def small(text_folder: Path) -> dict[str, Any]:
    return {
        "source": "files",
        "files": {"paths": [str(text_folder / "*.jsonl")], "column": "text"},
        "num_prompts": 12,
        "prompt_tokens": 8,
        "samples": 2,
        "max_new_tokens": NEW,
        "row_length": 32,
        "validation_fraction": 0.3,
        "batch_rows": 5,
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is not the teacher, and ends every fifteenth text or so."""
    return make_teacher(
        tmp_path_factory.mktemp("student") / "model", seed=3, num_hidden_layers=2, hidden_size=32
    )


def write(params: Params, model: Path, **options: Any) -> Rollouts:
    done = make_rollouts(params, model, dtype=torch.float32, device=CPU, **options)
    assert done is not None
    return done


def written(params: Params) -> dict[tuple[int, int], list[int]]:
    """The sampled tokens of each prompt and sample, by the journal."""
    lines = (params.paths.rollouts / "rollouts.jsonl").read_text().splitlines()[1:]
    found = map(json.loads, lines)
    return {(line["prompt"], line["sample"]): line["ids"] for line in found}


def documents(corpus: Path, split: str) -> list[tuple[list[int], list[bool]]]:
    """The documents of a split, in order, with what is in the loss."""
    rows = CorpusSplit(corpus, split).rows(0, len(CorpusSplit(corpus, split)))
    found: dict[int, tuple[list[int], list[bool]]] = {}
    for ids, tokens, in_loss in zip(rows.doc_ids, rows.tokens, rows.in_loss, strict=True):
        for number in sorted({*ids.tolist()} - {PADDING}):
            assert number not in found  # whole, in one row
            place = ids == number
            found[number] = tokens[place].tolist(), in_loss[place].tolist()
    return [found[number] for number in range(len(found))]


def prompts_of(params: Params) -> list[list[int]]:
    tokenizer = load_tokenizer(params.paths.teacher)
    return read_rollout_prompts(params.rollouts, tokenizer, params.rollouts.row_length).ids


def test_documents_are_prompts_and_the_sampled_tokens(params: Params, student: Path) -> None:
    done = write(params, student)
    prompts, new = prompts_of(params), written(params)
    assert len(prompts) == 12
    assert all(len(prompt) == 8 for prompt in prompts)
    expected = [([*prompts[n], *ids], len(ids)) for (n, _), ids in sorted(new.items())]
    found = [document for split in SPLITS for document in documents(done.corpus, split)]
    assert sorted(tokens for tokens, _ in found) == sorted(tokens for tokens, _ in expected)
    for tokens, in_loss in found:
        assert in_loss == [False] * 8 + [True] * (len(tokens) - 8)
    assert done.num_rollouts == len(expected) == 24
    assert done.num_tokens == done.new_tokens == sum(count for _, count in expected)
    assert done.num_ended == sum(ids[-1] == 0 for ids in new.values())
    assert 0 < done.num_ended < 24
    assert all(0 not in ids[:-1] for ids in new.values())  # nothing after the end of a text
    assert {len(ids) for ids in new.values() if ids[-1] != 0} == {NEW}
    assert max(max(ids) for ids in new.values()) < 300  # the model has 320 rows


def test_a_prompt_is_in_one_split_with_all_its_rollouts(params: Params, student: Path) -> None:
    done = write(params, student)
    beginnings = [
        {tuple(tokens[:8]) for tokens, _ in documents(done.corpus, split)} for split in SPLITS
    ]
    assert not beginnings[0] & beginnings[1]
    assert [len(found) for found in beginnings] == [
        done.splits[split].num_documents / 2 for split in SPLITS
    ]
    other = change(
        params,
        rollouts={"validation_fraction": 0.5, "row_length": 64},
        paths={"rollouts": str(params.paths.rollouts)},
    )
    again = write(other, student)
    assert again.new_tokens == 0  # the rollouts stay, the corpus is another one
    assert CorpusSplit(again.corpus, "train").info.row_length == 64


def test_each_token_is_where_its_number_falls_in_the_models_own_distribution(
    params: Params, student: Path
) -> None:
    """By transformers' logits over the whole text, without a cache, and a plain running sum."""
    write(params, student)
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    prompts = prompts_of(params)
    for (number, sample), ids in written(params).items():
        prompt = prompts[number]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, :, :300].double()
        running = logits[len(prompt) - 1 : -1].softmax(-1).cumsum(-1)
        [chances] = rollout_uniforms([(number, sample)], NEW, params.seed)
        for token, chance, sums in zip(ids, chances.tolist(), running, strict=False):
            before = 0.0 if token == 0 else float(sums[token - 1])
            assert before - 1e-5 <= chance <= float(sums[token]) + 1e-5


def test_samples_and_seeds_differ(params: Params, student: Path) -> None:
    write(params, student)
    first = written(params)
    assert len({tuple(ids) for ids in first.values()}) == 24
    other = params.model_copy(update={"seed": 1})
    with pytest.raises(MismatchError, match=r"made with seed=0, not 1: .* set paths.rollouts"):
        write(other, student)
    write(other, student, overwrite=True)
    assert not {*map(tuple, first.values())} & {*map(tuple, written(other).values())}


def test_no_rollout_depends_on_the_batch(params: Params, student: Path, tmp_path: Path) -> None:
    write(params, student)
    expected = written(params)
    for rows in (1, 24):
        here = change(
            params, rollouts={"batch_rows": rows}, paths={"rollouts": str(tmp_path / str(rows))}
        )
        write(here, student)
        assert written(here) == expected
        for split in SPLITS:
            one, two = (
                CorpusSplit(p.paths.rollouts / "corpus.zarr", split) for p in (params, here)
            )
            assert one.info == two.info


def test_what_was_stopped_goes_on(
    params: Params, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(params, student)
    here = change(params, paths={"rollouts": str(tmp_path / "stopped")})
    open_model, calls = rollouts.open_rollout_model, 0

    def open_and_stop(*words: Any, **options: Any) -> RolloutModel:
        model = open_model(*words, **options)

        def stops(*words: Any) -> list[list[int]]:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return model(*words)

        return stops

    monkeypatch.setattr(rollouts, "open_rollout_model", open_and_stop)
    with pytest.raises(KeyboardInterrupt):
        write(here, student)
    assert len(written(here)) == 10
    assert not (here.paths.rollouts / "corpus.zarr").exists()
    done = write(here, student)
    assert calls == 3 + 3  # of 5 batches, two were there
    assert done.new_tokens < done.num_tokens
    assert written(here) == written(params)
    assert make_rollouts(here, student, dtype=torch.float32, device=CPU) is None
    assert calls == 6
    shutil.rmtree(here.paths.rollouts / "corpus.zarr")
    assert write(here, student).new_tokens == 0  # the journal holds them all
    for split in SPLITS:
        one, two = (CorpusSplit(p.paths.rollouts / "corpus.zarr", split) for p in (params, here))
        assert one.info == two.info


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}])
def test_transformers_writes_the_same(student: Path, options: dict[str, float]) -> None:
    """With a folder whose own words ask for something else."""
    settings = GenerationSettings(max_new_tokens=NEW, eos_ids=(0, 7), num_ids=300, **options)  # type: ignore[arg-type]
    prompts = [[5, 9, 200, 31, 8, 8], [7, 8], [100]]
    uniforms = rollout_uniforms([(n, 0) for n in range(3)], NEW, 4)
    file = student / "generation_config.json"
    before = file.read_text()
    file.write_text('{"do_sample": true, "top_k": 1, "repetition_penalty": 9.0, "min_length": 50}')
    try:
        theirs = _OfTransformers(student, torch.float32, CPU, dequantize=False)
    finally:
        file.write_text(before)
    ours = _Ours(student, torch.float32, CPU)
    assert context_of(student) == 128
    assert theirs(prompts, settings, uniforms) == ours(prompts, settings, uniforms)
    one_by_one = [
        ours([prompt], settings, chance[None])
        for prompt, chance in zip(prompts, uniforms, strict=True)
    ]
    assert [row for [row] in one_by_one] == ours(prompts, settings, uniforms)


def test_a_model_that_only_transformers_runs_writes(params: Params, tmp_path: Path) -> None:
    done = write(params, make_qwen3(tmp_path / "qwen3"))
    assert done.num_rollouts == 24


def by_vllm(params: Params, python: Path, folder: Path, **rollouts: Any) -> Params:
    return change(
        params,
        rollouts={"engine": "vllm"} | rollouts,
        prepare={"vllm": {"python": str(python), "options": {}}},
        paths={"rollouts": str(folder)},
    )


def test_vllm_writes(params: Params, student: Path, vllm_python: Path, tmp_path: Path) -> None:
    """A stand-in for it, that is: tests/teacher/fake_vllm.py."""
    greedy = change(params, rollouts={"temperature": 0, "samples": 1})
    write(greedy, student)
    there = by_vllm(greedy, vllm_python, tmp_path / "greedy")
    write(there, student)
    assert written(there) == written(greedy)
    with pytest.raises(MismatchError, match=r"made with engine=.?vllm 1\.2\.3"):
        write(by_vllm(there, vllm_python, tmp_path / "greedy", engine="transformers"), student)


def test_a_missing_continuation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any, what: str, remedy: str) -> None:
        raise DecantError(f"{what}: {remedy}")

    monkeypatch.setattr(VllmProcess, "_fail", fail)
    for lengths, ids, match in (([1], 1, "1 continuations of 2 prompts"), ([1, 1], 3, "2 contin")):
        reply = {"lengths": lengths}, np.zeros(ids, np.int32).tobytes()
        monkeypatch.setattr(VllmProcess, "_exchange", lambda *_, reply=reply: reply)
        process = VllmProcess.__new__(VllmProcess)
        process._key = "rollouts.engine"
        with pytest.raises(DecantError, match=f"{match}.* choose rollouts.engine=transformers"):
            process.continuations(np.array([5, 6], np.int32), [1, 1], [{}, {}])


def test_vllm_gets_a_seed_for_each_rollout(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    answer = [[7, 299], [5, 0, 9]]

    class Process:
        version = "1.2.3"
        about: ClassVar = {"dtype": "float32"}

        def __init__(self, *_: Any, **options: Any) -> None:
            assert options["key"] == "rollouts.engine"

        def continuations(self, ids: Any, lengths: Any, sampling: Any) -> list[list[int]]:
            assert ids.tolist() == [5, 9, 200, 7]
            assert lengths == [3, 1]
            asked.extend(sampling)
            return answer

        def close(self) -> None: ...

    monkeypatch.setattr(rollout_models, "VllmProcess", Process)

    def opened(dtype: torch.dtype = torch.float32) -> RolloutModel:
        return VllmRollouts(student, VllmParams(), row_length=64, dtype=dtype, device=CPU)

    settings = GenerationSettings(max_new_tokens=NEW, temperature=1.0, eos_ids=(0,), num_ids=300)
    prompts, requests = [[5, 9, 200], [7]], [(0, 0), (7, 1)]
    for seed in (0, 0, 1):
        uniforms = rollout_uniforms(requests, NEW, seed)
        assert opened()(prompts, settings, uniforms) == [[7, 299], [5, 0]]
    seeds = [options["seed"] for options in asked]
    assert seeds[:2] == seeds[2:4]
    assert len({*seeds}) == 4
    assert all(options["ignore_eos"] and options["stop_token_ids"] == [0] for options in asked)
    assert all(type(seed) is int and 0 <= seed < 2**53 for seed in seeds)
    answer[0] = [300]
    with pytest.raises(DecantError, match="a row of the head that none of the tokenizer's 300 ids"):
        opened()(prompts, settings, uniforms)
    with pytest.raises(
        DecantError, match=r"float32 though bfloat16 was asked: set rollouts\.dtype"
    ):
        opened(torch.bfloat16)


def test_prepare_and_the_gate_take_the_corpus(params: Params, student: Path) -> None:
    done = write(params, student)
    here = change(
        params,
        paths={"corpus": str(done.corpus)},
        prepare={"temperatures": [1.0]},
        verify={"batches": 4, "noise_batches": 2},
    )
    require_tokenizer(here.paths.teacher, CorpusSplit(done.corpus, "train"))
    capture_all(here)
    assert gate(here).passed
    rows = CorpusSplit(done.corpus, "train").rows(0, 2)
    assert int(positions_in_loss(rows).sum()) == int(rows.in_loss.sum())  # the prompt predicts one
    card = dataset_card(here, [open_cache(here, split) for split in SPLITS], {}, "org/name", None)
    writer = hash_weights(student)
    assert f"| text | rollouts of the model with sha256 {writer[:12]} |" in card
    assert f"`{writer}`" in card
    assert f"| teacher | {teacher_line(here)} |" in card
    assert data_line(here) not in card


def test_greedy_rollouts_need_no_seed(params: Params, student: Path) -> None:
    greedy = change(params, rollouts={"temperature": 0, "samples": 1})
    write(greedy, student)
    expected = written(greedy)
    assert (
        make_rollouts(
            greedy.model_copy(update={"seed": 5}), student, dtype=torch.float32, device=CPU
        )
        is None
    )
    assert written(greedy) == expected


def chats(folder: Path, teacher: Path) -> tuple[Path, Path]:
    """A teacher with a chat template, and conversations for it."""
    copy = shutil.copytree(teacher, folder / "chatty")
    (copy / "chat_template.jinja").write_text(CHATML)
    user = {"role": "user", "content": "the cat sees <|endoftext|> a"}
    answer = {"role": "assistant", "content": "river"}
    lines: list[Sequence[dict[str, str]]] = [
        [user],
        [{"role": "system", "content": "be brief"}, user, answer, user, answer],
        [user, answer],  # the same prompt as the first
        [answer],
        [{"role": "user", "content": "word " * 200}],
        *([{"role": "user", "content": f"Note {n}"}] for n in range(12)),
    ]
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return copy, file


def test_conversations_are_prompts_up_to_the_reply(
    params: Params, teacher_folder: Path, tmp_path: Path
) -> None:
    teacher, file = chats(tmp_path, teacher_folder)
    tokenizer = load_tokenizer(teacher)
    chosen = RolloutsParams.model_validate(
        params.rollouts.model_dump()
        | {"num_prompts": None, "files": {"paths": [str(file)], "column": "messages"}}
        | {"row_length": 256}
    )
    found = read_rollout_prompts(chosen, tokenizer, 256)
    text = "<|im_start|>user\nthe cat sees <|endoftext|> a<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.ids[0]) == text
    assert 0 not in found.ids[0]  # the words of a user end no text
    assert tokenizer.decode(found.ids[1]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        + text.removesuffix("<|im_start|>assistant\n")
        + "<|im_start|>assistant\nriver<|im_end|>\n"
        + text
    )
    assert found.num_duplicates == 1
    assert [place.rpartition(" ")[2] for place in found.unusable] == ["4", "5"]
    only, long = found.unusable.values()
    assert "has only the assistant's turns" in only
    assert "tokens, with max_new_tokens=12, exceed the 256 of a row" in long
    assert len(found.ids) == 14
    said = list(found.left_out())
    assert said[0] == "1 prompts are left out, as others have the same tokens"
    assert said[1] == "2 of 17 documents are left out:"


def test_wrong_inputs_are_one_sentence(params: Params, student: Path, tmp_path: Path) -> None:
    def refuses(match: str, kind: type[DecantError] = DecantError, **changes: Any) -> None:
        model = changes.pop("model", student)
        with pytest.raises(kind, match=match):
            write(change(params, rollouts=changes), model)

    short = make_teacher(tmp_path / "short", max_position_embeddings=16)
    refuses(r"none of the 12 documents .* exceed the 16 of a row, or of the model", model=short)
    refuses(r"puts all of the 1 prompts into \w+, .* give more prompts", ParamsError, num_prompts=1)
    refuses(
        "there is no column 'words', only text",
        files=small(tmp_path)["files"] | {"paths": params.rollouts.files.paths, "column": "words"},
    )
    refuses("nothing matches 'absent", files={"paths": ["absent.jsonl"], "column": "text"})
    foreign = make_teacher(tmp_path / "foreign")
    make_tokenizer(foreign, vocab_size=290)
    vocabulary = json.loads((foreign / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens["!"], tokens['"'] = tokens['"'], tokens["!"]
    (foreign / "tokenizer.json").write_text(json.dumps(vocabulary))
    refuses(r"id 1 is '.' there and '.' in .*, and 1 more differ", MismatchError, model=foreign)
    narrow = make_teacher(tmp_path / "narrow", vocab_size=299)
    refuses("299 vocabulary rows, and the teacher's tokenizer 300 ids", model=narrow)
    (narrow / "tokenizer.json").unlink()
    refuses("holds no tokenizer.json, so nothing says that its ids are the teacher's", model=narrow)
    for changes, sentence in (
        ({"max_new_tokens": 25}, "exceed row_length=32, and rows hold whole rollouts"),
        ({"temperature": 0}, "would all be the same"),
    ):
        with pytest.raises(ValueError, match=sentence):
            change(params, rollouts=changes)


def test_a_model_without_an_end_of_text_token_writes_to_the_limit(
    params: Params, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(student, tmp_path / "endless")
    teacher = shutil.copytree(params.paths.teacher, tmp_path / "teacher")
    for folder in (model, teacher):
        for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
            values = json.loads((folder / file).read_text())
            values = {key: value for key, value in values.items() if "eos" not in key}
            (folder / file).write_text(json.dumps(values))
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|other|>"))
    here = change(params, paths={"teacher": str(teacher)})
    done = write(here, model)
    assert "no token ends a text of this model" in capsys.readouterr().out
    assert done.num_ended == 0
    assert {len(ids) for ids in written(here).values()} == {NEW}


def test_uniforms_are_of_the_request_alone() -> None:
    both = rollout_uniforms([(0, 0), (7, 1)], 6, seed=2)
    assert torch.equal(both[1:], rollout_uniforms([(7, 1)], 6, seed=2))
    assert torch.equal(both[:, :3], rollout_uniforms([(0, 0), (7, 1)], 3, seed=2))
    assert not np.intersect1d(both, rollout_uniforms([(0, 1), (1, 7)], 6, seed=2)).size
