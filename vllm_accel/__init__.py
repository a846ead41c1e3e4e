"""One call, every attention implementation, the fastest correct one for the hardware at hand, and why.

>>> from vllm_accel import attention, explain
>>> out = attention(q, k, v, causal=True)          # (B, S, H, D)
>>> print(explain(attention, q, k, v, causal=True))
"""

# The package of adapters must be loaded before the function `backends` below takes its name: the import system would
# put the package over the function when the first adapter is imported.
import vllm_accel.backends
import vllm_accel.cublas  # noqa: F401
from vllm_accel.dispatch.device import Device
from vllm_accel.dispatch.gemm_spec import Scaling
from vllm_accel.dispatch.override import use_backend
from vllm_accel.dispatch.registry import names as _names
from vllm_accel.dispatch.registry import register_backend
from vllm_accel.dispatch.selection import Candidate, Selection, State
from vllm_accel.dispatch.settings import reload_settings
from vllm_accel.errors import BackendUnavailableError, Reason, UnsupportedCallError, VllmAccelError
from vllm_accel.ops.attention import attention, attention_varlen
from vllm_accel.ops.cache import PagedKVCache
from vllm_accel.ops.cache_blocks import CacheFullError
from vllm_accel.ops.cache_step import CacheStep
from vllm_accel.ops.explain import explain
from vllm_accel.ops.gemm import gemm, grouped_gemm, scaled_gemm
from vllm_accel.ops.merge import merge_attention
from vllm_accel.ops.mla import attention_mla
from vllm_accel.ops.module import Attention
from vllm_accel.ops.moe import fused_moe
from vllm_accel.ops.moe_module import MoE
from vllm_accel.ops.paged import attention_paged
from vllm_accel.ops.quantize import quantize_fp8, quantize_int8
from vllm_accel.ops.quantized_linear import QuantizedLinear
from vllm_accel.ops.warmup import warmup
from vllm_accel.ops.write_kv import write_kv

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "BackendUnavailableError",
    "CacheFullError",
    "CacheStep",
    "Candidate",
    "Device",
    "MoE",
    "PagedKVCache",
    "QuantizedLinear",
    "Reason",
    "Scaling",
    "Selection",
    "State",
    "UnsupportedCallError",
    "VllmAccelError",
    "attention",
    "attention_mla",
    "attention_paged",
    "attention_varlen",
    "backends",
    "explain",
    "fused_moe",
    "gemm",
    "grouped_gemm",
    "merge_attention",
    "quantize_fp8",
    "quantize_int8",
    "register_backend",
    "reload_settings",
    "scaled_gemm",
    "use_backend",
    "warmup",
    "write_kv",
]


def backends(op: str = "attention") -> tuple[str, ...]:
    """Name the backends of an operation (``"attention"`` or ``"gemm"``), built-in and registered; imports none.

    Raises:
        ValueError: the operation does not exist.
    """
    from vllm_accel.dispatch.registry import operations

    if op not in operations():
        raise ValueError(f"op={op!r} is not an operation; known: {', '.join(operations())}")
    return _names(op)
