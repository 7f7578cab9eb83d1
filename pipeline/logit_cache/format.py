"""The specification of the logit cache on disk, detailed enough for a reader in another language.

A cache has one Zarr v3 group per split (`logits.zarr/train`, `logits.zarr/validation`), in a folder
or under a prefix of an object store. It holds N rows of L tokens in corpus order. For each position
K ids are kept exactly and M ids are sampled from the rest; there are J temperatures and V valid
vocabulary ids. Ids >= V (rows of the head to which no tokenizer id points) are left out of every
sum.

    id_order              [V]        uint32   the ids in order of frequency (below)
    id_indices            [N, L, K]  uintX    indices into id_order of the K most probable ids,
                                              by descending logit
    logprob_deltas        [N, L, K]  uint16   their float16 log-probabilities at temperature 1
    lse                   [N, L]     float32  logsumexp of the position's V logits:
                                              logit = logprob + lse
    lse_tau               [N, L, J]  float32  log sum_v exp(logprob_v / tau_j) over all V ids
    entropy               [N, L]     float16  entropy at temperature 1, nats
    sampled_index_deltas  [N, L, M]  uintX    indices into id_order of M sampled ids, ascending
    sampled_logprobs      [N, L, M]  float16  log-probabilities of the sampled ids at temperature 1

uintX is uint16 if V <= 65,536, else uint32. Arrays with K = 0 or M = 0 are left out. Positions of
padding tokens are stored like any others.

Id order. Only few ids appear among the top K, and some far more often than others, but a tokenizer
numbers ids in an order of its own. Numbered by how often they appear, the ids compress to 95 bytes
per token instead of 109 (K = 64, SmolLM2). id_order is counted once, on the first rows that the
teacher sees, and is a permutation of 0..V-1: id = id_order[index].

Deltas. Let b_k be the k-th value (for log-probabilities: the float16's bits read as uint16). Then
stored[0] = b_0 and stored[k] = b_k - b_(k-1), modulo 2^16 (or 2^32); decode by a cumulative sum
with the same modulus. The bits of descending negative float16 values ascend, so the deltas are
small; the transform is exact for any bits. logprob_deltas is stored with its last axis first (the
transpose codec), because deltas at the same k resemble each other.

Sampled ids. M ids are sampled with replacement from the teacher's distribution at temperature 1,
conditioned on not being among the K. Let p_t be the mass outside the K ids. Putting p_t / M on each
sampled id gives a target whose expectation is the teacher's full distribution (Anshumann et al.
2025, "Sparse Logit Sampling"). With K = 0 the sampled ids come from the whole distribution. The
sampled ids of corpus row r depend only on (seed, r) and the probabilities, so every writer samples
the same ids.

Shards. Every array with N rows is cut into shards of shard_rows rows, one object each,
`<array>/c/<shard>` and one `/0` for each further axis, which contain chunks of chunk_rows rows;
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

A reader refuses a format_version other than its own. The version also increases when the same
inputs would give other numbers (pipeline/targets/topk.py), since any program of the same version
may continue a cache that another has begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from pipeline.errors import MismatchError, shortened
from pipeline.io.checked_json import Crc, Length, Number, Sha256, Size, parse
from pipeline.io.zarr_shards import Entry

Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
FORMAT_VERSION = 1
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
    temperatures: tuple[Temperature, ...]
    vocab_size: Length  # V
    num_rows: Size  # N
    row_length: Length  # L

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Parse the attributes of a group.

        Raises:
            KeyError: a field is missing.
            DamagedError: a value has another type.
        """
        known = {field.name: values[field.name] for field in fields(cls)}
        return parse(cls, known, "its zarr.json")

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
