"""The base class of all sections of params, and the types that several of them share.

A class is a section of params.yaml, a field a key, its default the demo's value. The docstring of
a class or a field is what stands beside it in params.yaml (`params_text.py`), where the bounds of
its type are added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from pipeline.io.address import Address, HubUrl, Url, parse_address


class Section(BaseModel):
    """A frozen section; unknown keys and infinities are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def _writable(value: object) -> Address:
    address = parse_address(value)
    if isinstance(address, HubUrl):
        raise ValueError("the hub is only read: use a path, s3:// or gs://")
    return address


Location = Annotated[Path | Url, PlainValidator(_writable), PlainSerializer(str, return_type=str)]
"""A path, s3://bucket/prefix or gs://bucket/prefix."""
LocationOrHub = Annotated[
    Path | Url, PlainValidator(parse_address), PlainSerializer(str, return_type=str)
]
"""A location, or hf://datasets/ORG/NAME@REVISION, which is only read."""


def _count_or_auto(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("it must be auto or a whole number of at least 1")


CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
PositiveOrZero = Annotated[float, Field(ge=0.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Temperature = Annotated[float, Field(ge=0.01, le=1000.0)]
"""Below 0.01, logit / tau leaves the range in which float32 normalisers are meaningful."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
