"""The gate between a cache and training: `gate` runs it, and describes how.

`agreement` compares positions, `limits` judges the errors, `sampled_ids` tests the sampled ids, and
`power` computes what a check of a given size can detect.
"""

from pipeline.verify.agreement import agreement
from pipeline.verify.gate import GateReport, run_gate

__all__ = ["GateReport", "agreement", "run_gate"]
