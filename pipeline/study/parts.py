"""The names of the study's parts, in the order of the report: the values of `--part`.

They are separate from the parts themselves (run.py), which import PyTorch.
"""

NAMES = (
    "reference",
    "architecture",
    "tensors",
    "tokenizer",
    "layer",
    "rmsnorm",
    "rope",
    "gqa",
    "swiglu",
    "cache",
    "speed",
)
