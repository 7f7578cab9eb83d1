"""Licence and origin of a teacher, from the front matter of its model card, README.md.

A folder and the hub have a card of their own. A GGUF file has the same facts in its metadata
(`general.license` and `general.base_model.<n>.repo_url` of the GGUF specification); `fetch` writes
a card from them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.io.files import write_text

CARD = "README.md"
_HUB = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)/?")


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Read the mapping between the first two `---` lines; empty without them or without a card."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def write_gguf_card(metadata: dict[str, Any], folder: Path) -> None:
    """Write a card from a GGUF file's metadata, unless it gives neither licence nor origin.

    Args:
        metadata: values by key.
    """
    front: dict[str, Any] = {}
    for key in ("license", "license.name", "license.link"):
        value = metadata.get(f"general.{key}")
        if isinstance(value, str) and value:
            front[key.replace(".", "_")] = value
    urls = [
        v for k, v in metadata.items() if re.fullmatch(r"general\.base_model\.\d+\.repo_url", k)
    ]
    found = (_HUB.fullmatch(url) for url in urls if isinstance(url, str))
    if bases := [match[1] for match in found if match]:
        front["base_model"] = bases
    if front:
        text = yaml.safe_dump(front, sort_keys=False)
        write_text(folder / CARD, f"---\n{text}---\n\nFrom the metadata of the GGUF file.\n")
