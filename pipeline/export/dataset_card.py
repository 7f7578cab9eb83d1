"""The card of a published corpus and cache: README.md with the front matter that the hub reads.

It states what the files say about themselves and what the gate measured on this cache; the names of
teacher and text are those of the parameters that made them. Of an imported cache they are not
recorded, and of rollouts the model that wrote them is named. It contains no local path.
"""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import DatasetCardData
from pydantic import ValidationError

from pipeline.config.params import Params
from pipeline.config.source_params import CorpusParams
from pipeline.data.corpus_zarr import other_text, read_made_from, rollouts_model
from pipeline.errors import DecantError
from pipeline.export.card import card_page, data_line, license_of, teacher_hash_name, teacher_line
from pipeline.export.shared_files import TOKENIZER, SharedFile
from pipeline.io.checked_json import DamagedError, parse
from pipeline.io.files import read_json_object
from pipeline.logit_cache.reader import CacheReader
from pipeline.model.folder import teacher_folder
from pipeline.runtime.console import readable_bytes
from pipeline.runtime.markdown import markdown_table
from pipeline.teacher.front_matter import read_front_matter
from pipeline.verify.gate_report import GateReport

_OF_CACHE = ("dtype", "engine", "document_mask", "entropy_quantile", "format_version")
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B")
"""The hub's categories of a dataset by its number of examples, here rows: powers of ten from 3."""


def dataset_card(
    params: Params,
    readers: Sequence[CacheReader],
    files: dict[str, SharedFile],
    repo_id: str,
    license_id: str | None,
) -> str:
    """Return the card of a corpus and its cache.

    Args:
        readers: the cache of each split, which names its corpus.
        files: what is published beside the card.
    """
    rows = sum(len(reader.corpus) for reader in readers)
    front = DatasetCardData(
        license=license_id,
        task_categories=["text-generation"],
        size_categories=[_SIZES[min(max(len(str(rows)) - 3, 0), len(_SIZES) - 1)]],
        tags=["decant", "knowledge-distillation", "logits", "zarr"],
        viewer=False,  # the hub's viewer does not read Zarr
    )
    origin = readers[0].fingerprint.imported_from
    made = f"imported from {origin}" if origin else "captured by Decant"
    sections = [
        f"# {repo_id.partition('/')[2]}\n\nText as rows of token ids, and what a teacher predicted "
        "at each position: its most probable ids with their log-probabilities, "
        f"{made} for the distillation of smaller models without running the teacher.",
        f"## Contents\n\n{markdown_table(('', ''), _facts(params, readers))}",
        f"## Check against the teacher\n\n{_gate(params, readers)}",
        _use(repo_id, has_tokenizer=_has_tokenizer(files)),
        _terms(params, license_id, origin),
    ]
    return card_page(front, sections)


def gate_of(params: Params, readers: Sequence[CacheReader]) -> GateReport | None:
    """Return the gate's report, if the gate has run on this cache.

    Raises:
        DecantError: the gate's metrics.json is damaged.
    """
    file = params.paths.verify / "metrics.json"
    found = read_json_object(file)
    if found.get("cache_sha256") != {r.corpus.split: r.layout.sha256() for r in readers}:
        return None
    try:
        return parse(GateReport, found, str(file))
    except DamagedError as error:
        raise DecantError(f"{error}: run stages/verify.py again") from None


def _facts(params: Params, readers: Sequence[CacheReader]) -> list[tuple[str, str]]:
    made_from, info = readers[0].fingerprint, readers[0].corpus.info
    temperatures = sorted({1.0, *made_from.temperatures})
    num_bytes = sum(reader.num_bytes() for reader in readers)
    positions = sum(reader.corpus.info.num_positions for reader in readers)
    rows = [
        ("teacher", teacher_line(params, made_from.imported_from)),
        ("text", _text(params, made_from.imported_from)),
        ("kept of each position", made_from.kept),
        ("temperatures", ", ".join(f"{temperature:g}" for temperature in temperatures)),
        ("ids of the tokenizer", f"{info.vocab_size:,}"),
        ("bytes per token", f"{num_bytes / positions:.1f}, {readable_bytes(num_bytes)} in all"),
    ]
    for reader in readers:
        of = reader.corpus.info
        said = f"{of.num_tokens:,} tokens, {of.num_in_loss:,} of them in the loss"
        size = f"{of.num_rows:,} rows of {of.row_length:,}"
        rows.append((reader.corpus.split, f"{said}, in {size}, {of.num_documents:,} documents"))
    origin = ("imported_from",) if made_from.imported_from else ()
    rows += [
        (f"fingerprint: {name}", f"{getattr(made_from, name)}") for name in (*origin, *_OF_CACHE)
    ]
    of_teacher = teacher_hash_name(made_from.imported_from)
    hashes = {of_teacher: made_from.teacher_sha256, "tokenizer_sha256": info.tokenizer_sha256}
    hashes |= {f"corpus_sha256, {r.corpus.split}": r.corpus.info.sha256 for r in readers}
    rows += [(f"fingerprint: {name}", f"`{sha256}`") for name, sha256 in hashes.items()]
    writer = rollouts_model(read_made_from(params.paths.corpus))
    return rows + ([("model that wrote the rollouts, sha256", f"`{writer}`")] if writer else [])


def _text(params: Params, origin: str | None) -> str:
    return other_text(params.paths.corpus, origin) or data_line(_as_recorded(params))


def _as_recorded(params: Params) -> Params:
    """Return the parameters with those that the corpus itself says it was made by."""
    try:
        corpus = CorpusParams.model_validate(read_made_from(params.paths.corpus)["corpus"])
    except (KeyError, ValidationError):  # a corpus that someone else published does not say it
        return params
    return params.model_copy(update={"corpus": corpus})


def _gate(params: Params, readers: Sequence[CacheReader]) -> str:
    report = gate_of(params, readers)
    if report is None:
        return "Not measured: this cache was not compared with the live teacher before its push."
    verdict = "passed" if report.passed else f"FAILED: {'; '.join(report.failures)}"
    lines = "\n".join(report.lines())
    return (
        f"{report.batches:,} batches of rows, {report.tokens:,} tokens, were computed again by the "
        f"live teacher and compared with the cache; the gate {verdict}.\n\n```text\n{lines}\n```"
    )


def _has_tokenizer(files: dict[str, SharedFile]) -> bool:
    return any(path.startswith(f"{TOKENIZER}/") for path in files)


def _use(repo_id: str, *, has_tokenizer: bool) -> str:
    address = f"hf://datasets/{repo_id}"
    teacher = (
        f"`hf download {address}/{TOKENIZER}/ --local-dir shared` gets the tokenizer, with which "
        f"the student is saved if `paths.teacher` is `shared/{TOKENIZER}`"
        if has_tokenizer
        else "The teacher's tokenizer is not included"
    )
    return f"""## Use

In Decant's parameters, for `stages/train.py`:

```yaml
paths:
  corpus: {address}
  logits: {address}
```

An `@` and a commit after the name pin what is read. {teacher}.

In Python, with Decant:

```python
from torch.utils.data import DataLoader

from pipeline.integrations.cache_dataset import CacheDataset, ShardSampler, collate

rows = CacheDataset("{address}", "{address}")
loader = DataLoader(rows, batch_size=8, sampler=ShardSampler(rows, seed=0), collate_fn=collate)
batch = next(iter(loader))  # input_ids, labels [8, L]; teacher_ids, teacher_logprobs [8, L, K]
```

Corpus and cache are Zarr v3 groups, which any reader of Zarr opens. Decant compares every file with
the checksum in its shard's marker when it reads it."""


def _terms(params: Params, license_id: str | None, origin: str | None) -> str:
    teacher = teacher_line(params, origin)
    found = license_of(read_front_matter(teacher_folder(params.paths.teacher)))
    if found and not origin:
        teacher += f", licence {found}"
    said = (
        f"The rows can be decoded to the text ({_text(params, origin)}), and the targets are "
        f"predictions of the teacher ({teacher}). Whoever published them is responsible for the "
        "right to do so."
    )
    return f"## Licence\n\n{license_id or 'Not stated.'}\n\n{said}"
