"""DistillKit's compression, decoded: what an encoder written from its description has stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.errors import ParamsError
from pipeline.interchange.distillkit_codec import (
    Compression,
    LegacyCompression,
    bits_of_ids,
    read_compression,
    unpack_bits,
)
from pipeline.io.checked_json import DamagedError
from tests.interchange.distillkit_writer import COMPRESSION, LEGACY, columns_of, pack

BINS = [
    {"scale_dtype": "float16", "element_bits": 8, "num_elements": 5},
    {"scale_dtype": "float32", "element_bits": 3, "num_elements": 4},
]
ONE_BIT = {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 3}
CASES: dict[str, dict[str, Any]] = {
    "exact": COMPRESSION,
    "exact in bfloat16, as differences": COMPRESSION
    | {"exact_dtype": "bfloat16", "delta_encoding": True},
    "the capture of Qwen3-235B": COMPRESSION
    | {"exact_k": 4, "polynomial_terms": [0, 1, 2], "delta_encoding": True},
    "recommended": COMPRESSION
    | {
        "exact_k": 3,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    },
    "bins alone": COMPRESSION
    | {"exact_k": 4, "exact_dtype": "float16", "residual_bins": [*BINS, ONE_BIT]},
    "bins as differences": COMPRESSION
    | {"exact_k": 1, "residual_bins": [*BINS, *BINS[:1]], "delta_encoding": True},
    "polynomial and bins": COMPRESSION
    | {
        "exact_k": 4,
        "polynomial_terms": [0, "exp", 1],
        "term_dtype": "float64",
        "normalize_t": True,
        "residual_bins": BINS,
    },
    "nothing exact": COMPRESSION | {"exact_k": 0, "polynomial_terms": [0, 1, "sqrt"]},
    "legacy": LEGACY,
    "legacy, powers of 1/t": LEGACY | {"exact_k": 4, "polynomial_degree": 3},
    "legacy, powers of t": LEGACY
    | {"exact_k": 4, "polynomial_degree": 2, "invert_polynomial": False, "with_sqrt_term": True},
}


def some_targets(positions: int = 7, k: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Ids and descending log-probabilities [positions, K] of sharp and flat distributions."""
    draws = np.random.default_rng(0)
    logits = draws.normal(size=(positions, 300)) * draws.uniform(0.5, 6.0, (positions, 1))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, -1)[:, :k]
    return ids, np.take_along_axis(logprobs, ids, -1)


@pytest.mark.parametrize("about", CASES.values(), ids=list(CASES))
def test_decoded_is_what_the_encoder_stored(about: dict[str, Any]) -> None:
    ids, logprobs = some_targets()
    columns, said = columns_of(ids, logprobs, about)
    if "vocab_size" in about:
        found, values = LegacyCompression.model_validate(about).decode(
            np.array(columns["packed_indices"], np.uint64),
            np.array(columns["exact_values"], np.float32),
            np.array(columns["coeffs"], np.float32),
        )
    else:
        found, values = Compression.model_validate(about).decode(
            np.array(columns["bytepacked_indices"], np.uint8),
            np.array(columns["compressed_logprobs"], np.uint8),
        )
    np.testing.assert_array_equal(found, ids)
    # bfloat16 holds 8 bits, and the sums of differences are rounded to it
    coarse = about.get("exact_dtype") in ("bfloat16", "float16") and about["delta_encoding"]
    coarse |= about.get("exact_dtype") == "float16"
    np.testing.assert_allclose(
        values.double().numpy(), said, rtol=2**-8 if coarse else 2e-6, atol=2e-5
    )
    exact_k = about["exact_k"]
    if exact_k and not about.get("delta_encoding"):
        np.testing.assert_array_equal(values[:, :exact_k].double().numpy(), said[:, :exact_k])


@pytest.mark.parametrize("bits", [1, 3, 8, 17, 31])
def test_integers_of_any_width(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (4, 11))
    packed = np.array([pack(row, bits) for row in numbers.tolist()], np.uint8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, 11), numbers)


def test_bits_of_an_id() -> None:
    assert [bits_of_ids(number) for number in (2, 300, 32_768, 32_769, 151_936)] == [
        1,
        9,
        15,
        16,
        18,
    ]


def test_the_configuration_in_each_place_it_may_have(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    wanted = Compression.model_validate(COMPRESSION)
    for content in (
        COMPRESSION,
        {"logprob_compressor": COMPRESSION},
        {"model": "x", "teacher": {"kind": "dataset", "logprob_compressor": COMPRESSION}},
    ):
        file.write_text(yaml.safe_dump(content))
        assert read_compression(file) == wanted
    file.write_text(yaml.safe_dump({"teacher": {"legacy_logit_compression": LEGACY}}))
    assert read_compression(file) == LegacyCompression.model_validate(LEGACY)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("k: 4\n  d: 5", "cannot be read as YAML"),
        ("[1, 2]", "describes no compression of DistillKit's, the file:"),
        (yaml.safe_dump(COMPRESSION | {"exact_k": 17}), "exact_k=17 exceeds k=16"),
        (yaml.safe_dump(COMPRESSION | {"exact_k": 3}), "neither polynomial_terms nor residual"),
        (yaml.safe_dump(COMPRESSION | {"new_key": 1}), "new_key: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_configuration_is_refused(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ParamsError, match=words):
        read_compression(file)


def test_bytes_of_another_configuration_are_refused() -> None:
    ids, logprobs = some_targets()
    columns, _ = columns_of(ids, logprobs, COMPRESSION)
    packed = (
        np.array(columns["bytepacked_indices"], np.uint8),
        np.array(columns["compressed_logprobs"], np.uint8),
    )
    other = Compression.model_validate(COMPRESSION | {"exact_dtype": "bfloat16"})
    with pytest.raises(
        DamagedError, match=r"compressed_logprobs hold 64 entries per position .* 32"
    ):
        other.decode(*packed)
    other = Compression.model_validate(COMPRESSION | {"d": 1025})
    with pytest.raises(
        DamagedError, match=r"bytepacked_indices hold 18 entries per position .* 22"
    ):
        other.decode(*packed)
