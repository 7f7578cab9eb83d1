"""The folder as others open it, and the card in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.export.card import card_license, folder_card, run_card, run_facts
from pipeline.export.to_huggingface import write_huggingface
from pipeline.model.weights import load_student, save_student
from tests.helpers import change
from tests.models import edit_json, make_digit_tokenizer, text_of_many_lines

OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
ids = tokenizer("the cat sees", return_tensors="pt")["input_ids"]
out = model.generate(ids, max_new_tokens=4)
assert not any(name.startswith("pipeline") for name in sys.modules)
torch.save((ids, model(ids).logits.detach(), out, str(model.dtype)), sys.argv[2])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, qwen_folder: Path) -> Path:
    """A folder as a run leaves it: our config.json, no generation_config.json."""
    folder = tmp_path_factory.mktemp("run") / "model"
    save_student(load_student(qwen_folder), folder, tokenizer_from=qwen_folder)
    assert "eos_token_id" not in json.loads((folder / "config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_huggingface(trained, folder, torch.bfloat16)
    return folder


def test_it_opens_with_none_of_our_code(exported: Path, trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-c", OPEN, str(exported), str(tmp_path / "out.pt")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    ids, logits, out, dtype = torch.load(tmp_path / "out.pt", weights_only=True)
    assert dtype == "torch.bfloat16"
    ours = load_student(trained).to(torch.bfloat16).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, ours(ids), atol=0.1, rtol=0.05)
    assert out.shape[1] <= ids.shape[1] + 4


def test_weights_are_those_of_the_run_rounded(exported: Path, trained: Path) -> None:
    ours, theirs = (
        load_file(trained / "model.safetensors"),
        load_file(exported / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor.bfloat16()), name


def test_special_ids_and_template_are_the_tokenizers(exported: Path, trained: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    generation = json.loads((exported / "generation_config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (322, 320)
    assert config["dtype"] == "bfloat16"
    assert generation["eos_token_id"] == [320, 322]  # the end of a document, the end of a turn
    assert "temperature" not in generation
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (trained, exported))
    messages = [{"role": "user", "content": "hello"}]
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(
        messages, tokenize=False
    )
    assert (exported / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    said = json.loads((exported / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"local_files_only", "is_local", "backend"} & said.keys()


def test_a_qwen2_with_another_tokenizer_is_exported_so_that_it_opens_with_it(
    qwen_folder: Path, tmp_path: Path
) -> None:
    """As runs of older versions are: transformers would open Qwen2's own tokenizer."""
    source = shutil.copytree(qwen_folder, tmp_path / "run")
    make_digit_tokenizer(source)
    edit_json(source / "config.json", bos_token_id=7)
    (tmp_path / "export").mkdir()
    write_huggingface(source, tmp_path / "export", torch.float32)
    text = text_of_many_lines()
    wanted = Tokenizer.from_file(str(source / "tokenizer.json"))
    found = AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = found(text, add_special_tokens=False)["input_ids"]
    assert ids == wanted.encode(text, add_special_tokens=False).ids
    tokens = torch.randint(0, 300, (2, 12))
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (source, tmp_path / "export")
    ]
    logits = [model(tokens).logits for model in models]
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
    assert models[1].config.model_type == "llama"
    assert models[1].config.bos_token_id == 7
    ours = load_student(tmp_path / "export").eval()
    torch.testing.assert_close(ours(tokens), logits[0], atol=1e-5, rtol=1e-5)


def test_what_a_folder_says_is_kept(qwen_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen_folder, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", eos_token_id=321)
    (tmp_path / "model" / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.7, "eos_token_id": 321}'
    )
    (tmp_path / "x").mkdir()
    write_huggingface(tmp_path / "model", tmp_path / "x", torch.float32)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["eos_token_id"] == 321
    generation = json.loads((tmp_path / "x" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["temperature"]) == (321, 0.7)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert theirs.dtype == torch.float32


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.bfloat16), (1e5, torch.float16)])
def test_numbers_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "x").mkdir()
    with pytest.raises(DecantError, match=r"layers\.1\.mlp\.up_proj\.weight that are not finite"):
        write_huggingface(tmp_path / "model", tmp_path / "x", dtype)


METRICS = {
    "teacher": {"loss": 2.5, "perplexity": 12.18, "tokens": 600},
    "student": {"loss": 3.125, "perplexity": 22.76, "tokens": 600},
}
RUN: dict[str, Any] = {
    "train": {"targets": "cached", "steps": 48, "temperature": 1.0},
    "cache": {
        "teacher_sha256": "19f1f3",
        "k": 16,
        "num_sampled": 4,
        "top_p": 0.9,
        "entropy_quantile": 0.5,
    },
}


@pytest.fixture
def params_of_run(tiny_params: Params) -> Params:
    run = tiny_params.paths.runs / "student"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(RUN))
    tiny_params.paths.evaluate.mkdir(parents=True)
    (tiny_params.paths.evaluate / "metrics.json").write_text(json.dumps(METRICS))
    return tiny_params


def front(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text.split("---")[1])
    assert ModelCard(text).data.to_dict() == content  # as the hub's library reads it
    return dict(content)


def test_card_of_a_run(params_of_run: Params, tmp_path: Path) -> None:
    teacher = {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    params = change(params_of_run, export=teacher)
    text = run_card(params, "student", ["student-f16.gguf"])
    assert front(text) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["decant", "knowledge-distillation"],
    }
    for row in (
        "| cache: teacher_sha256 | 19f1f3 |",
        "| cache: num_sampled | 4 |",
        "| cache: top_p | 0.9 |",
        "| cache: entropy_quantile | 0.5 |",
        "| train.targets | cached |",
        "| train.steps | 48 |",
        "|  | teacher | student |",
        "| validation loss | 2.5000 | 3.1250 |",
        "| data | local files, their column 'text' |",
    ):
        assert row in text
    assert "llama-cli -m student-f16.gguf" in text
    assert "On 600 tokens held out" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("teacher", "student", "said", "silent"),
    [
        ("online", {"init": "random"}, "distilled from its live teacher by", "offline"),
        ("none", {"init": "random"}, "A causal language model, trained by", "SmolLM2"),
        ("none", {"init": "layers", "layers": [0, 2]}, "| start | 2 layers of the", "distil"),
        ("cached", {"init": "checkpoint", "checkpoint": "a/start"}, "| start | start |", "a/start"),
        (None, {}, "A causal language model, trained by", "distil"),  # nothing is known of it
    ],
)
def test_card_says_what_the_run_did(
    teacher: str | None, student: dict[str, Any], said: str, silent: str, params_of_run: Params
) -> None:
    run = {"train": {"targets": teacher} if teacher else {}, "student": student}
    (params_of_run.paths.runs / "student" / "run.json").write_text(json.dumps(run))
    params = change(params_of_run, export={"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    text = run_card(params, "student", [])
    assert said in text
    assert silent not in text
    has_teacher = teacher in ("cached", "online") or student.get("init") == "layers"
    assert ("base_model" in front(text)) is has_teacher
    assert ("| student.layers | 0, 2 |" in text) is ("layers" in student)
    assert ("\n| teacher |" in text) is has_teacher


def test_card_invents_nothing(params_of_run: Params) -> None:
    """By the project's own defaults: nothing of the demo's teacher stands on another's card."""
    text = run_card(params_of_run, "baseline", [])
    assert set(front(text)) == {"library_name", "pipeline_tag", "tags"}
    assert "Not stated: the terms of the teacher and the data may apply." in text
    assert "Evaluation" not in text  # nobody measured it
    assert "llama" not in text


@pytest.mark.parametrize("init", ["random", "layers"])
def test_an_imported_cache_has_no_recorded_teacher(
    init: str, params_of_run: Params, tmp_path: Path
) -> None:
    """The teacher in paths.teacher need not be it, so neither name nor licence are taken."""
    run = RUN | {"student": {"init": init}, "cache": RUN["cache"] | {"imported_from": "distillkit"}}
    (params_of_run.paths.runs / "student" / "run.json").write_text(json.dumps(run))
    teacher = shutil.copytree(params_of_run.paths.teacher, tmp_path / "licensed")
    (teacher / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    hub = {"teacher": {"source": "hub"}, "corpus": {"source": "hub"}}
    params = change(params_of_run, paths={"teacher": str(teacher)}, **hub)
    text = run_card(params, "student", [])
    assert "| teacher | not recorded, imported from distillkit |" in text
    assert "| data | unrecorded text, imported from distillkit |" in text
    assert "| cache: sha256 of the imported files | " in text
    assert "teacher_sha256" not in text
    assert "datasets" not in front(text)
    has_layers = init == "layers"
    assert ("| teacher of the layers | Qwen/Qwen2.5-0.5B at revision" in text) is has_layers
    assert ("Qwen/Qwen2.5-0.5B" in text) is has_layers
    assert front(text).get("base_model") == ("Qwen/Qwen2.5-0.5B" if has_layers else None)
    assert front(text).get("license") == ("mit" if has_layers else None)
    unknown = [] if has_layers else ["export.license", "export.base_model"]
    assert run_facts(params, "student").unknown == unknown
    named = change(params, export={"base_model": "someone/teacher"})
    assert front(run_card(named, "student", []))["base_model"] == "someone/teacher"


def test_card_of_hub_teacher_and_data(params_of_run: Params) -> None:
    params = change(params_of_run, teacher={"source": "hub"}, corpus={"source": "hub"})
    content = front(run_card(params, "student", []))
    assert content["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert content["datasets"] == ["wikimedia/wikipedia"]
    named = change(params, export={"base_model": "someone/teacher"})
    assert front(run_card(named, "student", []))["base_model"] == "someone/teacher"


def test_card_names_all_sources_of_a_mixture(params_of_run: Params) -> None:
    one = {"id": "a/b", "name": None, "revision": "1" * 40}
    sources = [{"source": "files", "weight": 3}, {"source": "hub", "hub": one}]
    text = run_card(change(params_of_run, corpus={"sources": sources}), "student", [])
    assert front(text)["datasets"] == ["a/b"]
    data = f"75.0% local files, their column 'text', 25.0% a/b; a/b at revision {'1' * 40}"
    assert f"| data | {data} |" in text


OTHER = "license: other\nlicense_name: research\nlicense_link: https://example.org/terms\n"


@pytest.mark.parametrize(
    ("said", "expected", "unknown"),
    [
        ("license: mit\nbase_model: a/b\n", {"license": "mit", "base_model": "a/b"}, []),
        ("base_model: [a/b, c/d]\n", {"base_model": ["a/b", "c/d"]}, ["export.license"]),
        ("license: mit\nbase_model: 7\n", {"license": "mit"}, ["export.base_model"]),
        (OTHER, dict(yaml.safe_load(OTHER)), ["export.base_model"]),
        ("", {}, ["export.license", "export.base_model"]),
    ],
)
def test_card_takes_what_the_teachers_own_card_says(
    said: str,
    expected: dict[str, Any],
    unknown: list[str],
    params_of_run: Params,
    tmp_path: Path,
) -> None:
    teacher = tmp_path / "own"
    teacher.mkdir()
    (teacher / "README.md").write_text(f"---\n{said}---\n# A teacher\n")
    params = change(params_of_run, paths={"teacher": str(teacher)})
    content = front(run_card(params, "student", []))
    for key in ("library_name", "pipeline_tag", "tags"):
        del content[key]
    assert content == expected
    assert run_facts(params, "student").unknown == unknown


def test_card_says_which_steps_weights_were_kept(params_of_run: Params) -> None:
    assert "lowest validation loss" not in run_card(params_of_run, "student", [])
    curves = params_of_run.paths.runs / "student" / "dvclive"
    curves.mkdir()
    (curves / "metrics.json").write_text('{"validation": {"best_step": 24.0, "best_loss": 2.0}}')
    row = "| weights | of step 24, the lowest validation loss |"
    assert row in run_card(params_of_run, "student", [])


def test_licence_comes_from_the_models_own_card(tmp_path: Path) -> None:
    assert card_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# A model\n")
    card = folder_card(tmp_path, "name", [])
    assert front(card)["license"] == "mit"
    assert "rounded to the format that config.json names" in card
    for unreadable in ("# no front matter\n", "---\n: [\n---\n", "---\nlicense: [a]\n---\n"):
        (tmp_path / "README.md").write_text(unreadable)
        assert card_license(tmp_path) is None
