"""The public conformance kit: cases, a float64 oracle, the tolerance rule, and checks for any backend.

>>> from vllm_accel.testing import CASES, check_backend
>>> for case in CASES: check_backend(my_backend, case, dtype=torch.float32)
>>> for case in PAGED_CASES: check_paged_backend(my_backend, case, dtype=torch.bfloat16, where="cuda")
>>> for case in GEMM_CASES: check_gemm_backend(my_products, case, dtype=torch.bfloat16)
"""

from vllm_accel.testing.cases import CASES, Case
from vllm_accel.testing.cases_gemm import GEMM_CASES, GemmCase
from vllm_accel.testing.cases_paged import PAGED_CASES, PagedCase
from vllm_accel.testing.conformance import check_backend, check_call, kernel_call
from vllm_accel.testing.conformance_gemm import check_gemm_backend, check_gemm_call, gemm_kernel_call
from vllm_accel.testing.conformance_paged import check_paged_backend, check_paged_call, paged_kernel_call
from vllm_accel.testing.oracle import attention_oracle, attention_paged_oracle, attention_varlen_oracle
from vllm_accel.testing.oracle_gemm import product_oracle
from vllm_accel.testing.oracle_moe import moe_oracle
from vllm_accel.testing.outcome import Outcome

__all__ = [
    "CASES",
    "GEMM_CASES",
    "PAGED_CASES",
    "Case",
    "GemmCase",
    "Outcome",
    "PagedCase",
    "attention_oracle",
    "attention_paged_oracle",
    "attention_varlen_oracle",
    "check_backend",
    "check_call",
    "check_gemm_backend",
    "check_gemm_call",
    "check_paged_backend",
    "check_paged_call",
    "gemm_kernel_call",
    "kernel_call",
    "moe_oracle",
    "paged_kernel_call",
    "product_oracle",
]
