"""The gate between a cache and training: `gate` runs it, and says how.

`agreement` compares positions, `limits` judges, `draws` tests drawn ids, and `power` says what a
check of this size can find.
"""

from pipeline.fidelity.agreement import agreement
from pipeline.fidelity.gate import GateReport, run_gate

__all__ = ["GateReport", "agreement", "run_gate"]
