"""The model's modules, hyper-parameters and files, and each tensor of the checkpoint.

Our names are Hugging Face's (pipeline/model/decoder.py), so nothing is renamed on loading, and
values are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.io.hashes import hash_file
from pipeline.io.ownership import MARK
from pipeline.model.weights import OUT_BIAS
from pipeline.runtime.device import dtype_name
from pipeline.study.comparison import Comparison, Part, shape_of
from pipeline.study.subject import Subject

_OUR_NAMES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size (embedding rows)",
    "max_position_embeddings": "max_seq_len",
    "rope_parameters": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "hidden_act": "silu, always",
    "attention_bias": "attention_bias (q, k, v)",
    "attention_dropout": "dropout",
    "tie_word_embeddings": "tie_embeddings",
}
"""Hugging Face's key of config.json -> our field."""


def architecture(subject: Subject) -> Part:
    """Show the module tree, counts, and hyper-parameters under both names."""
    model = subject.theirs
    parameters = sum(parameter.numel() for parameter in model.parameters())
    part = Part(
        name="architecture",
        title="Architecture",
        notes=[f"{type(model).__name__}, {parameters:,} parameters, a tied matrix counted once."],
        texts={"Modules": module_tree(model)},
        tables={
            "Hyper-parameters": [
                ("Hugging Face's key", "value", "ours"),
                *(
                    (key, getattr(subject.config, key), ours)
                    for key, ours in _OUR_NAMES.items()
                    if hasattr(subject.config, key)
                ),
            ],
        },
    )
    if not subject.unsupported:
        zeros = (p.numel() for name, p in model.named_parameters() if name.endswith(OUT_BIAS))
        ours = subject.ours.count_parameters() + sum(zeros)  # see pipeline/model/weights.py
        part.comparisons.append(Comparison("number of parameters", abs(ours - parameters), 0))
    return part


def module_tree(model: nn.Module, name: str = "", depth: int = 0) -> str:
    """Return one line per module, with name and class; equal entries of a list appear once."""
    described = model.extra_repr().replace("\n", " ") if not list(model.children()) else ""
    lines = ["  " * depth + f"{name}{': ' if name else ''}{type(model).__name__}({described})"]
    if isinstance(model, nn.ModuleList) and len({repr(child) for child in model}) == 1:
        children = [(f"0..{len(model) - 1}", model[0])]
    else:
        children = list(model.named_children())
    lines += [module_tree(child, label, depth + 1) for label, child in children]
    return "\n".join(lines)


def tensors(subject: Subject) -> Part:
    """List the folder's files and weights, and compare the weights with ours."""
    stored = _stored(subject.folder)
    theirs = subject.theirs
    ours: nn.Module = nn.Module() if subject.unsupported else subject.ours
    our_names = {name for name, _ in ours.named_parameters(remove_duplicate=False)}
    rows = [
        (
            name,
            shape_of(tensor),
            dtype_name(tensor.dtype),
            _owner(theirs, name),
            f"{tensor.nbytes:,}",
            f"the same, in {_owner(ours, name)}" if name in our_names else "none",
        )
        for name, tensor in stored.items()
    ]
    total = sum(tensor.nbytes for tensor in stored.values())
    return Part(
        name="tensors",
        title="Weights",
        notes=[f"{len(stored)} tensors, {total:,} bytes ({total / 1e6:,.1f} MB) in safetensors."],
        comparisons=_against(ours, theirs, stored) if our_names else [],
        tables={
            "Files of the folder": [
                ("file", "bytes", "sha256"),
                *(
                    (file.name, f"{file.stat().st_size:,}", hash_file(file))
                    for file in sorted(subject.folder.iterdir())
                    if file.is_file() and file.name != MARK
                ),
            ],
            "Every tensor": [
                ("key", "shape", "dtype", "module", "bytes", "our name for it"),
                *rows,
            ],
        },
    )


def _against(ours: nn.Module, theirs: nn.Module, stored: dict[str, Tensor]) -> list[Comparison]:
    """Compare names and values: as stored, and as Hugging Face loaded them."""
    loaded, mine = dict(theirs.named_parameters()), dict(ours.named_parameters())
    return [
        Comparison("names of parameters that only one has", len(loaded.keys() ^ mine.keys()), 0),
        Comparison("values, as loaded", _largest_difference(mine, loaded), 0),
        Comparison("values, as stored", _largest_difference(mine, stored), 0),
    ]


def _largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of tensors that both have; NaN if any is NaN."""
    pairs = [(ours[name].cpu(), theirs[name].cpu()) for name in ours.keys() & theirs.keys()]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return float(torch.stack([(a - b.float()).abs().max() for a, b in pairs]).max())


def _stored(folder: Path) -> dict[str, Tensor]:
    """Read all safetensors of a folder, with layer 2 before layer 10."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return dict(sorted(found.items(), key=lambda entry: _natural(entry[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _owner(model: nn.Module, name: str) -> str:
    """Return the class of the module that holds a parameter."""
    try:
        return type(model.get_submodule(name.rpartition(".")[0])).__name__
    except AttributeError:
        return "none"
