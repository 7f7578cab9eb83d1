"""The front matter of a model card, README.md: what a teacher's folder says of licence and origin.

A folder and the hub have a card of their own. A GGUF file has the same facts among its metadata
(`general.license` and `general.base_model.<n>.repo_url` of the GGUF specification), from which
`fetch` writes a card.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.files import write_text

CARD = "README.md"
_HUB = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)/?")


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The mapping between the first two lines of `---`; empty where there is none, or no card."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}


def write_gguf_card(metadata: dict[str, Any], folder: Path) -> None:
    """A card of what a GGUF file's metadata says; none where it says neither licence nor origin.

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
