"""Text in, text out: folders' defaults, streams of whole characters, chats, and bad prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pipeline.config.params import Params
from pipeline.errors import DecantError, ParamsError, printable
from pipeline.evaluation.samples import sample
from pipeline.generation.prompts import read_prompts
from pipeline.generation.sampling import GenerationSettings
from pipeline.generation.text_generator import PieceDecoder, TextGenerator
from pipeline.model.tokenizer import load_tokenizer
from stages.generate import main
from tests.models import make_teacher, make_tokenizer

PROMPTS = ["the cat sees", "Note 3: the river", "a"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random teacher with a chat template, and words that say nothing of sampling."""
    copy = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(teacher_folder, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


@pytest.fixture(scope="module")
def generator(folder: Path) -> TextGenerator:
    return TextGenerator(folder)


SETTINGS = GenerationSettings(max_new_tokens=20)


def test_texts_equal_hugging_face(folder: Path, generator: TextGenerator) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = []
    for prompt in PROMPTS:
        inputs = generator.tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        expected.append(generator.tokenizer.decode(new, skip_special_tokens=True))
    for batch_rows in (1, 2, 3):
        assert generator.generate(PROMPTS, SETTINGS, batch_rows=batch_rows) == expected
    assert ["".join(generator.stream(prompt, SETTINGS)) for prompt in PROMPTS] == expected


def test_counts_are_of_real_tokens(folder: Path) -> None:
    generator = TextGenerator(folder)
    generator.generate(PROMPTS, GenerationSettings(max_new_tokens=4, eos_ids=()))
    list(generator.stream("a", GenerationSettings(max_new_tokens=3, eos_ids=())))
    lengths = [len(generator.tokenizer(prompt)["input_ids"]) for prompt in [*PROMPTS, "a"]]
    assert generator.counts.prompt_tokens == sum(lengths)
    assert generator.counts.new_tokens == 3 * 4 + 3
    assert generator.counts.seconds > 0


def test_batches_draw_on_from_each_other(generator: TextGenerator) -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0, seed=3)
    texts = generator.generate(["the cat"] * 4, settings, batch_rows=2)
    assert len(set(texts)) == 4
    assert generator.generate(["the cat"] * 4, settings, batch_rows=2) == texts


@pytest.mark.parametrize("text", ["naïve 世界 🙂🙃 the cat", "שלום\n\n  x", "�ok�"])
def test_stream_never_splits_a_character(text: str, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text) / 2  # bytes, mostly
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.flush() == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)
        assert decoder.flush() == ""


def test_stream_of_arbitrary_tokens_is_their_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for ids in torch.randint(0, 300, (20, 40)).tolist():
        decoder = PieceDecoder(tokenizer)
        text = "".join(decoder.push(token) for token in ids) + decoder.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_character_that_is_never_completed_comes_at_the_end(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    decoder = PieceDecoder(tokenizer)
    half = tokenizer("世")["input_ids"][:2]
    assert [decoder.push(token) for token in half] == ["", ""]
    assert decoder.flush() == "�"


def test_chat_reads_the_template_and_stops_where_told(generator: TextGenerator) -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
    ]
    text = "[user] hello\n[assistant] yes\n[user] why\n[assistant]"
    assert generator.apply_chat_template(messages) == text
    reply = "".join(generator.chat(messages, SETTINGS))
    assert reply == generator.generate([text], SETTINGS)[0]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, {"temperature": 0.0, "eos_ids": (0,)}),  # <|endoftext|>, the tokenizer's eos too
        ({"eos_token_id": [7, 3]}, {"temperature": 0.0, "eos_ids": (3, 7)}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": None, "top_p": None}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": 20}, {"temperature": 1.0, "top_k": 20, "top_p": 1.0}),
        (  # Qwen2.5-0.5B-Instruct
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1},
            {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1, "top_k": 0},
        ),
    ],
)
def test_folder_says_what_the_user_does_not(
    said: dict[str, Any] | None, expected: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    raw = json.loads((copy / "config.json").read_text())
    del raw["eos_token_id"]
    (copy / "config.json").write_text(json.dumps(raw))
    (copy / "generation_config.json").unlink()
    if said is not None:
        (copy / "generation_config.json").write_text(json.dumps(said))
    generator = TextGenerator(copy)
    filled = generator.fill(GenerationSettings())
    assert {name: getattr(filled, name) for name in expected} == expected
    chosen = GenerationSettings(
        temperature=0.5, top_k=3, top_p=0.3, repetition_penalty=1.5, eos_ids=(9,)
    )
    assert generator.fill(chosen) == chosen


def test_broken_generation_config_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(DecantError, match=r"generation_config\.json cannot be read as JSON"):
        TextGenerator(copy)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"do_sample": True, "temperature": "hot"}, "'hot'|'str'"),
        ({"eos_token_id": ["</s>"]}, "</s>"),
    ],
)
def test_generation_config_that_asks_the_impossible_is_named(
    said: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(DecantError, match=rf"generation_config\.json is refused .*({message})"):
        TextGenerator(copy)


def test_bad_prompts_are_one_sentence(generator: TextGenerator) -> None:
    with pytest.raises(ParamsError, match="prompt 2 is empty: give at least one character"):
        generator.generate(["a", ""], SETTINGS)
    with pytest.raises(ParamsError, match="prompt 1 is empty"):
        generator.generate([""], SETTINGS)
    with pytest.raises(
        ParamsError, match=r"prompt has 120 tokens.*max_new_tokens=20 exceeds.*context of 128"
    ):
        generator.stream("世" * 40, SETTINGS)
    assert len(list(generator.stream("世" * 40, GenerationSettings(max_new_tokens=8)))) > 0
    with pytest.raises(ParamsError, match="the conversation has 1"):
        generator.chat([{"role": "user", "content": "世" * 40}], SETTINGS)


def test_model_without_template_or_rows_is_told(teacher_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DecantError, match="has no chat template"):
        TextGenerator(teacher_folder).chat([{"role": "user", "content": "a"}])
    small = make_teacher(tmp_path / "small", vocab_size=60)
    with pytest.raises(DecantError, match="the model has 60 embedding rows"):
        TextGenerator(small).generate(["the cat"], SETTINGS)


def test_template_that_refuses_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text("{{ raise_exception('user first') }}")
    with pytest.raises(DecantError, match=r"refuses the conversation.*user first"):
        TextGenerator(copy).chat([{"role": "user", "content": "a"}])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def test_other_architectures_are_named(gpt2: Path) -> None:
    with pytest.raises(DecantError, match="'gpt2' model: this student reads qwen2, qwen3, llama"):
        TextGenerator(gpt2)


def test_samples_of_any_teacher(gpt2: Path, generator: TextGenerator, folder: Path) -> None:
    settings = GenerationSettings(max_new_tokens=5)
    assert sample(folder, ("the cat",), 5) == generator.generate(["the cat"], settings)
    assert len(sample(gpt2, ("the cat",), 5)) == 1


def test_samples_are_greedy_whatever_the_folder_says(gpt2: Path, tmp_path: Path) -> None:
    expected = sample(gpt2, ("the cat", "a"), 12)
    shutil.copytree(gpt2, tmp_path / "model")
    habits = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "num_beams": 3}
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | habits))
    assert sample(tmp_path / "model", ("the cat", "a"), 12) == expected


def stage(params: Params, tmp_path: Path, *words: str, typed: str | None = None) -> Result:
    """stages/generate.py with tiny settings; `params` has written params.yaml."""
    command = ["--params", str(tmp_path / "params.yaml"), "--set", "generate.max_new_tokens=6"]
    return CliRunner().invoke(main, [*command, *words], input=typed, catch_exceptions=False)


def test_stage_continues_a_prompt(tiny_params: Params, folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(folder), "--set", "generate.dtype=float32"]
    done = stage(tiny_params, tmp_path, *words, "--prompt", "the cat")
    assert done.exit_code == 0, done.output
    text = TextGenerator(folder).generate(["the cat"], GenerationSettings(max_new_tokens=6))[0]
    assert done.output.startswith(f"the cat{printable(text)}\ngenerate: 6 tokens from ")
    assert "tokens/s" in done.output


def test_stage_continues_a_file_of_prompts(
    tiny_params: Params, folder: Path, tmp_path: Path
) -> None:
    lines, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "texts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": p}) + "\n\n" for p in PROMPTS))
    words = ["--model", str(folder), "--prompts", str(lines)]
    done = stage(tiny_params, tmp_path, *words, "--output", str(output))
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [pair["prompt"] for pair in found] == PROMPTS
    assert all(pair["text"] for pair in found)
    plain = tmp_path / "prompts.txt"
    plain.write_text("\n".join(PROMPTS))
    done = stage(tiny_params, tmp_path, "--model", str(folder), "--prompts", str(plain))
    for number, pair in enumerate(found, 1):
        said = printable(pair["prompt"] + pair["text"])
        assert f"--- {number}\n{said}\n" in done.output


def test_stage_chats_line_by_line(tiny_params: Params, folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(folder), "--set", "generate.repetition_penalty=1.5"]
    typed = "hello\n\nwhy\n/reset\nhello\n"
    done = stage(tiny_params, tmp_path, *words, typed=typed)
    assert done.exit_code == 0, done.output
    before, after = done.output.split("(forgotten)\n")
    first, summary = after.split("generate: 18 tokens from ")
    assert before.startswith(first)  # the same answer to the same words
    assert before.removeprefix(first).strip()  # and one that remembers
    generator = TextGenerator(folder)
    alone = len(generator.tokenizer("[user] hello\n[assistant]")["input_ids"])
    assert int(summary.split()[0]) > 3 * alone  # the second turn read the first again
    too_long = "x " * 70
    done = stage(tiny_params, tmp_path, *words, typed=f"{too_long}\nhello\n")
    assert done.exit_code == 0
    assert "the conversation has 1" in done.output
    assert "/reset starts a new conversation" in done.output
    assert done.output.count("generate: 6 tokens") == 1


def test_stage_refuses_in_one_sentence(
    tiny_params: Params, folder: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    model = ["--model", str(folder)]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    cases = [
        ([*model, "--prompt", ""], 2, "the prompt is empty"),
        ([*model, "--prompt", "a" * 200], 2, "exceeds the model's context of 128"),
        ([*model, "--prompt", "a", "--prompts", "b.txt"], 2, "exclude each other"),
        ([*model, "--prompt", "a", "--output", "b"], 2, "--output needs --prompts"),
        ([*model, "--prompts", str(tmp_path / "absent")], 2, "cannot be read as text"),
        ([*model, "--prompts", str(tmp_path / "empty.txt")], 2, "holds no prompts"),
        ([*model, "--prompts", str(tmp_path / "bad.jsonl")], 2, "bad.jsonl line 2 is not of"),
        ([*model, "--prompt", "a", "--set", "generate.top_p=0"], 2, "generate.top_p=0 is refused"),
        (["--model", str(teacher_folder)], 1, "has no chat template"),
        (
            ["--prompt", "a"],
            1,
            "model holds no config.json: run stages/train.py --run student first",
        ),
        (["--model", str(tmp_path / "absent")], 1, "absent holds no config.json"),
    ]
    for words, code, sentence in cases:
        done = stage(tiny_params, tmp_path, *words, typed="")
        assert done.exit_code == code, (words, done.output)
        assert not done.stdout, words  # nothing is said before the request is known to be good
        assert sentence in done.output, (words, done.output)
        assert done.output.count("error: ") == 1


def test_ctrl_c_ends_a_reply_but_not_the_chat(
    tiny_params: Params, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, pushed = PieceDecoder.push, []

    def interrupted(self: PieceDecoder, token: int) -> str:
        pushed.append(token)
        if len(pushed) == 3:
            raise KeyboardInterrupt
        return push(self, token)

    monkeypatch.setattr(PieceDecoder, "push", interrupted)
    done = stage(tiny_params, tmp_path, "--model", str(folder), typed="hello\nwhy\n")
    assert done.exit_code == 0, done.output
    assert done.output.count(" ...\n") == 1
    assert "generate: 9 tokens" in done.output  # three of the first, six of the second


def test_ctrl_c_ends_a_single_text_with_status_130(
    tiny_params: Params, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: PieceDecoder, token: int) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(PieceDecoder, "push", interrupted)
    done = stage(tiny_params, tmp_path, "--model", str(folder), "--prompt", "the cat")
    assert done.exit_code == 130
    assert done.stdout == "the cat\n"
    assert "error: interrupted" in done.stderr


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_lines_of_prompts_end_at_newlines_alone(name: str, tmp_path: Path) -> None:
    """Unicode's other line ends are text: our own jsonl holds them as they are."""
    prompts = ["a\u2028b", "c\x0cd"]
    said = [json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts]
    lines = prompts if name.endswith("txt") else said
    (tmp_path / name).write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert read_prompts(tmp_path / name) == prompts


def test_help_says_what_is_read_and_written() -> None:
    text = " ".join(CliRunner().invoke(main, ["--help"]).output.split())
    for word in ("--params", "--set KEY=VALUE", "Reads generate.*", "writes only what --output"):
        assert word in text
