"""One decoder layer in isolation: its input and output are saved, and both models' layers rerun."""

from __future__ import annotations

import torch
from safetensors.torch import load, save

from pipeline.study.section import Section, Table, compare
from pipeline.study.subject import Subject
from pipeline.study.trace import trace_layer


@torch.no_grad()
def layer(subject: Subject) -> Section:
    """Run the chosen layer on the prompt's hidden states, read back from the saved file."""
    found = trace_layer(subject)
    kept = {name: found[name] for name in ("layer.input", "layer.output", "cos", "sin")}
    number = subject.layer
    name = f"layer_{number}.safetensors"
    content = save({key: tensor.contiguous().cpu() for key, tensor in kept.items()})
    read = {key: tensor.to(subject.device) for key, tensor in load(content).items()}
    x, cos, sin = read["layer.input"], read["cos"], read["sin"]
    causal = torch.full((x.shape[1],) * 2, -torch.inf, device=x.device).triu(1)[None, None]
    again = subject.theirs.model.layers[number](
        x, attention_mask=causal, position_embeddings=(cos, sin)
    )
    ours = subject.our_block(x, cos[:, None], sin[:, None], None)
    rows = [
        (
            key,
            " x ".join(map(str, tensor.shape)),
            f"{float(tensor.mean()):.3g}",
            f"{float(tensor.std()):.3g}",
            f"{float(tensor.abs().max()):.4g}",
        )
        for key, tensor in ((key, read[key]) for key in kept)
    ]
    return Section(
        "layer",
        f"Layer {number} alone",
        prose=[
            f"What enters and leaves decoder layer {number} when the model reads the prompt, saved "
            f"as {name}, read back, and put through the layer once more: Hugging Face's by itself, "
            "and ours.",
        ],
        tables=[Table("Saved", ("tensor", "shape", "mean", "std", "largest |value|"), rows)],
        comparisons=[
            compare("Hugging Face's layer, run alone", again, read["layer.output"]),
            compare("our block", ours, read["layer.output"]),
        ],
        files={name: content},
    )
