"""The public conformance kit: cases, a float64 oracle, the tolerance rule, and checks for any attention backend.

>>> from vllm_accel.testing import CASES, check_backend
>>> for case in CASES: check_backend(my_backend, case, dtype=torch.float32)
"""

from vllm_accel.testing.cases import CASES, Case
from vllm_accel.testing.conformance import Outcome, check_backend, check_call, kernel_call
from vllm_accel.testing.oracle import attention_oracle, attention_varlen_oracle

__all__ = [
    "CASES",
    "Case",
    "Outcome",
    "attention_oracle",
    "attention_varlen_oracle",
    "check_backend",
    "check_call",
    "kernel_call",
]
