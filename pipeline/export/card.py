"""The model card: README.md with the front matter that the hub reads.

The card states what is known and omits the rest. Licence and base model come from export.*, or else
from the teacher's own card, unless the run learnt from an imported cache, whose teacher is not
recorded; metrics appear only if they were measured. It contains no local path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCardData

from pipeline.config.names import corpus_name, start_name, teacher_name
from pipeline.config.params import Params
from pipeline.config.source_params import TextSource
from pipeline.data.corpus_zarr import other_text
from pipeline.io.files import read_json_object
from pipeline.model.folder import teacher_folder
from pipeline.model.named_models import is_of_run
from pipeline.runtime.markdown import markdown_table
from pipeline.teacher.front_matter import read_front_matter

_FROM_TRAIN = ("targets", "divergence", "alpha", "temperature", "steps", "batch_rows", "dtype")
_FROM_CACHE = (
    "imported_from",
    "teacher_sha256",
    "tokenizer_sha256",
    "corpus_sha256",
    "dtype",
    "document_mask",
    "k",
    "num_sampled",
    "top_p",
    "entropy_quantile",
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


@dataclass(frozen=True)
class RunFacts:
    """What is known about a run, with what the front matter of its card says."""

    about: dict[str, Any]  # run.json
    license: str | None  # export.license, else that of the teacher's own card
    terms: dict[str, Any]  # name and link of a licence without an id on the hub
    base_model: str | list[str] | None
    has_teacher: bool  # whether the run uses its teacher: the predictions or the layers

    @property
    def unknown(self) -> list[str]:
        """Parameters of export.* that would add facts missing from the card."""
        missing = {
            "export.license": self.license is None,
            "export.base_model": self.has_teacher and self.base_model is None,
        }
        return [name for name, is_missing in missing.items() if is_missing]


def run_facts(params: Params, run: str) -> RunFacts:
    """Read a run's run.json and its teacher's card."""
    about = read_json_object(params.paths.runs / run / "run.json")
    is_taught, has_layers = _targets(about) in _HOW, _has_layers(about)
    # Nothing says that the teacher of an imported cache is the one in paths.teacher.
    is_known = _origin(about) is None or has_layers
    front = read_front_matter(teacher_folder(params.paths.teacher)) if is_known else {}
    base_model = _base_model(params, front) if is_known else params.export.base_model
    has_teacher = is_taught or has_layers
    terms = {}
    if not params.export.license and front.get("license") == "other":
        keys = ("license_name", "license_link")
        terms = {key: front[key] for key in keys if isinstance(front.get(key), str)}
    return RunFacts(
        about=about,
        license=params.export.license or license_of(front),
        terms=terms,
        base_model=base_model if has_teacher else None,
        has_teacher=has_teacher,
    )


def _targets(about: Mapping[str, Any]) -> str | None:
    found: str | None = about.get("train", {}).get("targets")
    return found


def _origin(about: Mapping[str, Any]) -> str | None:
    """Return the format that the cache of the run's targets was imported from, if it was."""
    found: str | None = about.get("cache", {}).get("imported_from")
    return found


def _has_layers(about: Mapping[str, Any]) -> bool:
    """Return whether the student began as layers of the teacher."""
    return bool(about.get("student", {}).get("init") == "layers")


def run_card(params: Params, run: str, files: Sequence[str]) -> str:
    """Return the card of a run, with the facts from its run.json and from paths.evaluate.

    Args:
        run: the run's name under paths.runs.
        files: names of the GGUF files beside the card.
    """
    facts = run_facts(params, run)
    about, how = facts.about, _HOW.get(_targets(facts.about) or "")
    origin = _origin(about)
    unrecorded = other_text(params.paths.corpus, origin)
    front = ModelCardData(
        license=facts.license,
        base_model=facts.base_model,
        datasets=None if unrecorded else [source.hub.id for source in _on_hub(params)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["decant", *(["knowledge-distillation"] if how else [])],
        **facts.terms,
    )
    rows = [("teacher", teacher_line(params, origin))] if facts.has_teacher else []
    if origin and _has_layers(about):
        rows.append(("teacher of the layers", teacher_line(params)))
    rows += _start(about.get("student", {}))
    rows.append(("data", unrecorded or data_line(params)))
    rows += [*_training(about), *_kept(params, run)]
    sections = [
        f"# {run}\n\nA causal language model, {how or 'trained'} by Decant.",
        _use(files),
        f"## Training\n\n{markdown_table(('', ''), rows)}",
        _evaluation(params, run),
        _terms(facts.license, "the teacher and the data"),
    ]
    return card_page(front, sections)


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
    return card_page(front, [said, _use(files), _terms(found, "the model it was made of")])


def card_license(folder: Path) -> str | None:
    """Return the licence in the front matter of a folder's README.md; None if there is none."""
    return license_of(read_front_matter(folder))


def license_of(front: Mapping[str, Any]) -> str | None:
    """Return the licence in a card's front matter, if it is one."""
    found = front.get("license")
    return found if isinstance(found, str) else None


def _base_model(params: Params, front: Mapping[str, Any]) -> str | list[str] | None:
    """Return the models that the hub should show this one as derived from; None if unknown.

    This is export.base_model, else the teacher's id on the hub, else the base model on the
    teacher's own card.
    """
    if params.export.base_model:
        return params.export.base_model
    if params.teacher.source == "hub":
        return params.teacher.hub.id
    found = front.get("base_model")
    if isinstance(found, list) and found and all(isinstance(entry, str) for entry in found):
        return found if len(found) > 1 else str(found[0])
    return found if isinstance(found, str) else None


def card_page(front: CardData, sections: Iterable[str]) -> str:
    """Return a card: front matter, then sections, of which empty ones are left out."""
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


def teacher_line(params: Params, origin: str | None = None) -> str:
    """Name the teacher, and for one from the hub its revision.

    Args:
        origin: the format that the cache was imported from, if it was.
    """
    if origin:
        return f"not recorded, imported from {origin}"
    teacher, name = params.teacher, teacher_name(params.teacher)
    if teacher.source == "hub":
        return f"{name} at revision {teacher.hub.revision}"
    named = f"{params.export.base_model}, as in " if params.export.base_model else ""
    return f"{named}{name}" + (
        f" of {teacher.wheel.requirement}" if teacher.source == "wheel" else ""
    )


def teacher_hash_name(origin: str | None) -> str:
    """Return what a card calls a cache's teacher_sha256, which import takes of the files read.

    Args:
        origin: the format that the cache was imported from, if it was.
    """
    return "sha256 of the imported files" if origin else "teacher_sha256"


def data_line(params: Params) -> str:
    """Name the text of corpus.*, and for text from the hub its revision."""
    name = corpus_name(params.corpus)
    if params.corpus.sources:
        at = [f"{source.hub.id} at revision {source.hub.revision}" for source in _on_hub(params)]
        return "; ".join([name, *at])
    hub = params.corpus.hub
    is_hub = params.corpus.source == "hub"
    return f"{name} {hub.split} at revision {hub.revision}" if is_hub else name


def _on_hub(params: Params) -> list[TextSource]:
    return [source for source in params.corpus.text_sources if source.source == "hub"]


def _start(student: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describe the student before training, as run.json records it."""
    if "init" not in student:
        return []
    layers = ", ".join(map(str, student.get("layers") or ()))
    chosen = [("student.layers", layers)] if student["init"] == "layers" else []
    return [("start", start_name(student)), *chosen]


def _training(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    train, cache = about.get("train", {}), about.get("cache", {})
    rows = [(f"train.{key}", str(train[key])) for key in _FROM_TRAIN if key in train]
    names = {"teacher_sha256": teacher_hash_name(cache.get("imported_from"))}
    rows += [
        (f"cache: {names.get(key, key)}", str(cache[key]))
        for key in _FROM_CACHE
        if cache.get(key) is not None
    ]
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
    table = markdown_table(head, rows, numbers=True)
    return (
        f"## Evaluation\n\nOn {tokens} held out from training, KL in nats per token; measured "
        f"before the weights were rounded for this export.\n\n{table}"
    )


def _terms(license_id: str | None, others: str) -> str:
    return f"## Licence\n\n{license_id or f'Not stated: the terms of {others} may apply.'}"
