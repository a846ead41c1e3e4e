"""The public conformance kit: cases, a float64 oracle, the tolerance rule, and checks for any attention backend.

>>> from vllm_accel.testing import CASES, check_backend
>>> for case in CASES: check_backend(my_backend, case, dtype=torch.float32)
>>> for case in PAGED_CASES: check_paged_backend(my_backend, case, dtype=torch.bfloat16, where="cuda")
"""

from vllm_accel.testing.cases import CASES, Case
from vllm_accel.testing.cases_paged import PAGED_CASES, PagedCase
from vllm_accel.testing.conformance import Outcome, check_backend, check_call, kernel_call
from vllm_accel.testing.conformance_paged import check_paged_backend, check_paged_call, paged_kernel_call
from vllm_accel.testing.oracle import attention_oracle, attention_paged_oracle, attention_varlen_oracle

__all__ = [
    "CASES",
    "PAGED_CASES",
    "Case",
    "Outcome",
    "PagedCase",
    "attention_oracle",
    "attention_paged_oracle",
    "attention_varlen_oracle",
    "check_backend",
    "check_call",
    "check_paged_backend",
    "check_paged_call",
    "kernel_call",
    "paged_kernel_call",
]
