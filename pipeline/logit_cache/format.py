"""The specification of the logit cache on disk, detailed enough for a reader in another language.

A cache has one Zarr v3 group per split (`logits.zarr/train`, `logits.zarr/validation`), in a folder
or under a prefix of an object store. It holds N rows of L tokens in corpus order. For each position
up to K ids are kept exactly and M ids are sampled from the rest; there are J temperatures and V
valid vocabulary ids. Ids >= V (rows of the head to which no tokenizer id points) are left out of
every sum.

    id_order              [V]           uint32   the ids in order of frequency (below)
    num_kept              [N, L]        uintC    number of ids that are kept at each position
    id_indices            [C, S_K]      uintX    indices into id_order of the most probable ids, by
                                                 descending logit; ragged (below)
    logprob_deltas        [C, S_K]      uint16   their float16 log-probabilities at temperature 1;
                                                 ragged
    lse                   [N, L]        float16  logsumexp of the position's V logits, about:
                                                 logit = logprob + lse
    entropies             [N, L, 1 + J] uint16   entropies in steps of 1/4096 nat (below)
    num_distinct          [N, L]        uintC    number of distinct ids that were sampled
    sampled_index_deltas  [C, S_M]      uintX    indices into id_order of these ids, ascending;
                                                 ragged
    sampled_counts        [C, S_M]      uintC    how often each of them was sampled; ragged
    sampled_logprobs      [C, S_M]      float16  their log-probabilities at temperature 1; ragged.
                                                 Left out if J = 0, as nothing needs them then

uintX is uint16 if V <= 65,536, else uint32. uintC is the narrowest of uint8, uint16 and uint32 that
holds K, or M. Arrays for K = 0 or M = 0 are left out.

Positions. A position t of a row has a target if its successor is in the loss: tokens t and t + 1
belong to the same document, and in_loss is 1 at t + 1 in the corpus. With an entropy quantile q,
only the positions with the highest entropies keep theirs, n - floor(q n) of a row's n. Everywhere
else all numbers are 0: num_kept or num_distinct says whether there is a target.

Ragged arrays. Let a chunk be chunk_rows consecutive rows; there are C = ceil(N / chunk_rows), of
which the last may have fewer rows. Row c of a ragged array holds the values of chunk c, position by
position, each position as many as its num_kept or num_distinct says, and 0 in what is left of
S_K = chunk_rows L K or S_M = chunk_rows L M. Only logprob_deltas is stored rank by rank, since
deltas of the same rank resemble each other: first those of rank 0 of all positions that have one,
then those of rank 1, and so on. docs/read_cache.py decodes all this in plain NumPy.

Id order. Only few ids appear among the top K, and some far more often than others, but a tokenizer
numbers ids in an order of its own. Numbered by how often they appear, the ids compress to 95 bytes
per token instead of 109 (K = 64, SmolLM2). id_order is counted once, on the first rows that the
teacher sees, and is a permutation of 0..V-1: id = id_order[index].

Deltas. Let b_k be the value of rank k (for log-probabilities: the float16's bits read as uint16).
Then stored[0] = b_0 and stored[k] = b_k - b_(k-1), modulo 2^16 (or 2^32); decode by a cumulative
sum over the ranks of a position with the same modulus. The bits of descending negative float16
values ascend, so the deltas are small; the transform is exact for any bits.

Nucleus. With top_p, a position keeps only the fewest of its K most probable ids that hold this
mass; without, it keeps all K.

Entropies. entropies[..., 0] is the Shannon entropy H of the full row at temperature 1. The others
are the Renyi entropies H_a = log sum_v p_v^a / (1 - a) of order a = 1/tau_j (Renyi 1961), from
which the normaliser at that temperature follows: log sum_v exp(logprob_v / tau) = (1 - 1/tau) H_a.
Unlike the normaliser, which may be large and negative below 1, every H_a is within 0 and log V.
Temperature 1, whose normaliser is 0, is not among the J.

Sampled ids. M ids are sampled with replacement from the teacher's distribution at temperature 1,
conditioned on not being among the kept ids. Let p_t be the mass outside these, and c_v how often v
was sampled. The target p_t c_v / M for each sampled id v has the teacher's full distribution as its
expectation (Anshumann et al. 2025, "Sparse Logit Sampling"). With K = 0 the ids are sampled from
the whole distribution. The sampled ids of corpus row r depend only on (seed, r) and the
probabilities, so every writer samples the same ids.

Shards. Every array of rows is cut into shards of shard_rows rows, one object each,
`<array>/c/<shard>` and one `/0` for each further axis, which contain chunks of chunk_rows rows; of
a ragged array the shard holds as many rows as these rows have chunks, each a Zarr chunk.
pipeline/io/zarr_shards.py describes their bytes. Any Zarr v3 reader can open them. Each chunk ends
with its crc32c, and so does the shard's index. id_order is one chunk.

Group attributes: {"decant": {...Fingerprint, "chunk_rows", "shard_rows", "id_order"},
"arrays": {array: crc32c of its zarr.json}, "crc32c"}. id_order is the name of the array
id_order: `id_order_` followed by the crc32c of its little-endian bytes in hexadecimal. "crc32c"
is the crc32c of the JSON text of the other attributes, keys sorted, with "," and ":" as separators.

Commit markers: `commits/<shard, six digits>.json` in the group,
    {"shard": i, "rows": [first, end), "cache": crc32c, "tokens_sha256": hex,
     "objects": {array: [bytes, xxh3]}, "crc32c": of the JSON text of the rest, as above}
where cache is the crc32c of the JSON text of the group's attribute "decant" without num_rows and
corpus_sha256, tokens_sha256 is `pipeline.data.corpus_zarr.hash_rows` of the corpus rows, and
objects gives the size of each array's shard and the 128-bit xxh3, in hexadecimal, of its key
followed by its bytes, so that a shard stored in the place of another is also detected. A shard
WITHOUT a marker does not exist, whatever its files contain: zarr reads a missing shard as zeros.
One writer owns a whole shard. It writes all arrays' objects durably (on a disk: write, fsync,
rename, fsync of the folder), and then the marker in the same way.

Growth. corpus_sha256 is a chain over the rows of the corpus (pipeline/data/corpus_zarr.py), so the
cache of a corpus to which rows are added is the cache of the longer corpus's first rows. It is
extended in place: num_rows and corpus_sha256 become those of the longer corpus, and markers, which
do not depend on them, stay. If the last shard was short, its marker is moved to
`short/<shard, six digits>.json` before that, so the shard is missing. A writer that captures it
reads the rows that it has, as of an array that ends with them, joins the new rows' targets to them,
writes the shard and its marker, and removes the file in `short`. If it is killed before the marker
is there, the old rows no longer match that file's hashes, and the whole shard is captured again.

Imported caches. If imported_from names a format, the cache was not captured from a teacher by
Decant but converted from files in that format (pipeline/interchange/), which keep nothing of the
full row: lse and entropies are 0 and have no meaning, J = M = 0, a position may keep fewer than K
ids although top_p is null, teacher_sha256 is the sha256 of what was imported, engine is the
format's name, and dtype is "unknown".

A reader refuses a format_version other than its own. The version also increases when the same
inputs would give other numbers (pipeline/targets/topk.py), since any program of the same version
may continue a cache that another has begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

from pydantic import Field

from pipeline.errors import MismatchError, shortened
from pipeline.io.checked_json import Crc, Length, Number, Sha256, Size, parse
from pipeline.io.zarr_shards import Entry

Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Quantile = Annotated[float, Field(ge=0.0, lt=1.0)]
FORMAT_VERSION = 1
ENTROPY_STEPS = 4096
"""Steps per nat of the stored entropies."""
COMMITS = "commits"
SHORT = "short"
"""Folder of the markers of shards that have fewer rows than they will have."""
ID_ORDER = "id_order_"
"""Prefix of an id order's name; the crc32c of its bytes follows."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The identity of a cache's inputs; readers and writers refuse a cache with another one."""

    format_version: int
    teacher_sha256: str
    tokenizer_sha256: str
    corpus_sha256: str  # of the split
    dtype: str  # the teacher's number format
    engine: str  # what ran the teacher, as far as it changes numbers
    document_mask: bool  # the teacher's, over a row (pipeline/model/attention_mask.py)
    k: Number
    num_sampled: Number  # M
    sampling_seed: Number  # 0 without sampled ids
    temperatures: tuple[Temperature, ...]  # other than 1
    top_p: Share | None
    entropy_quantile: Quantile
    vocab_size: Length  # V
    num_rows: Size  # N
    row_length: Length  # L
    imported_from: str | None = None  # name of a format; None: captured from the teacher by Decant

    @property
    def kept(self) -> str:
        """What is kept of each position, in words."""
        of_k = "" if self.top_p is None else f" up to mass {self.top_p:g}"
        parts = [f"the top {self.k}{of_k}"] if self.k else []
        parts += [f"{self.num_sampled} sampled ids"] if self.num_sampled else []
        return " + ".join(parts)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Parse the attributes of a group.

        Raises:
            KeyError: a field is missing.
            DamagedError: a value has another type.
        """
        known = {field.name: values[field.name] for field in fields(cls)}
        return parse(cls, known, "its zarr.json")

    def with_origin_of(self, imported: Fingerprint) -> Fingerprint:
        """Return it with what an imported cache says of its teacher, which nothing can confirm."""
        names = ("teacher_sha256", "dtype", "engine", "imported_from")
        return replace(self, **{name: getattr(imported, name) for name in names})

    def require_equal(self, other: Fingerprint, where: str, remedy: str) -> None:
        """Refuse another fingerprint, and name the first field that differs.

        Args:
            other: the fingerprint that is wanted now; `self` belongs to the cache at `where`.
        """
        if difference := self.difference(other):
            raise MismatchError(f"{where} {difference}: {remedy}")

    def difference(self, wanted: Fingerprint) -> str:
        """Describe the first field that differs; empty if none does."""
        mine, theirs = asdict(self), asdict(wanted)
        for name, value in mine.items():
            if value != theirs[name]:
                was, now = _brief(value), _brief(theirs[name])
                return f"was made with {name}={was}, wanted is {now}"
        return ""


def _brief(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= 80 else shortened(value)


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A shard's commit marker, as specified above."""

    shard: Number
    rows: tuple[Number, Number]
    cache: Crc
    tokens_sha256: Sha256
    objects: dict[str, Entry]
    crc32c: Crc = 0  # covers the other fields; `add_checksum` writes it


def marker_key(shard: int, folder: str = COMMITS) -> str:
    """Return the key of a shard's commit marker, or of its marker in `short`."""
    return f"{folder}/{shard:06d}.json"
