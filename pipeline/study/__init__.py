"""A model taken apart and compared with Hugging Face's, number by number.

`PART_NAMES` lists the parts in the order of the report, for `--part`; it is here because the parts
themselves (study.py) import PyTorch.
"""

PART_NAMES = (
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
