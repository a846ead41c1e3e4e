"""What a user of a CPU could take instead: compiled FlexAttention, and the GroupQueryAttention of ONNX Runtime.

Each function returns a call that gives (B, Sq, H, D), or raises `Missing` with the reason that there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Missing(Exception):
    """This contestant does not take part."""


def flex(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Callable[[], Tensor]:
    """Return compiled FlexAttention on (B, S, H, D) tensors; compiling happens here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n_q, n_k = q.shape[1], k.shape[1]
    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i + (n_k - n_q) >= j, None, None, n_q, n_k, device="cpu")
    args = [t.transpose(1, 2) for t in (q, k, v)]
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": q.shape[2] != k.shape[2]}
    # From nothing, and without gradients as when timed: a graph more for every shape and mode, and dynamo gives up.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        with torch.no_grad():
            compiled(*args, **options)
    except Exception as error:  # whatever inductor and the compiler make of it
        raise Missing(f"compiled FlexAttention: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from None
    return lambda: compiled(*args, **options).transpose(1, 2)


def onnx_gqa(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Return ONNX Runtime's GroupQueryAttention, causal, as its generation runs it.

    Past and present share one buffer (B, Hkv, Sk, D), which holds all keys but the last `Sq`; those are inputs and are
    written by the operator. Its threads do not spin between calls: they would slow down whoever comes next.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Missing(f"ONNX Runtime: {error} (pip install onnxruntime onnx)") from None
    if q.dtype is torch.bfloat16:
        raise Missing("ONNX Runtime: its GroupQueryAttention for CPUs takes fp32 and fp16, not bf16")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = _model(onnx, q.dtype, q.shape[2], k.shape[2])
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    batch, n_q, n_k = q.shape[0], q.shape[1], k.shape[1]

    def value(tensor: Tensor) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())

    binding = session.io_binding()
    feeds = {"query": q.flatten(2), "key": k[:, n_k - n_q :].flatten(2), "value": v[:, n_k - n_q :].flatten(2)}
    feeds["seqlens_k"] = torch.full((batch,), n_k - 1, dtype=torch.int32)
    feeds["total"] = torch.tensor(n_k, dtype=torch.int32)
    for name, tensor in feeds.items():
        binding.bind_ortvalue_input(name, value(tensor))
    for name, tensor in (("key", k), ("value", v)):
        shared = value(tensor.transpose(1, 2))
        binding.bind_ortvalue_input(f"past_{name}", shared)
        binding.bind_ortvalue_output(f"present_{name}", shared)
    out = value(torch.zeros_like(feeds["query"]))
    binding.bind_ortvalue_output("out", out)

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(out.numpy()).view(q.shape)

    return call


def _model(onnx: Any, dtype: torch.dtype, heads: int, kv_heads: int) -> Any:
    """Return a model of one node."""
    helper, types = onnx.helper, onnx.TensorProto
    kind = types.FLOAT16 if dtype is torch.float16 else types.FLOAT
    inputs = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total"]
    outputs = ["out", "present_key", "present_value"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, outputs, domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads
    )

    def info(name: str) -> Any:
        if name == "total":
            return helper.make_tensor_value_info(name, types.INT32, [])
        if name == "seqlens_k":
            return helper.make_tensor_value_info(name, types.INT32, ["batch"])
        sizes = [f"{name}_{i}" for i in range(4 if "_" in name else 3)]
        return helper.make_tensor_value_info(name, kind, sizes)

    graph = helper.make_graph([node], "gqa", [info(n) for n in inputs], [info(n) for n in outputs])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
