"""How `fmha` launches a kernel: tensors with a batch, lengths and windows as mask objects.

Read in xformers 0.0.35: xformers/ops/fmha/attn_bias.py (masks: "FromBottomRight" in a name is the alignment; a window
counts the key on the diagonal), cutlass.py and flash.py (which masks an operator takes, forward and backward),
common.py (shapes).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vllm_accel.backends.cutlass_kernel import Call, Grads
from vllm_accel.backends.cutlass_layout import expand_heads, sum_groups
from vllm_accel.backends.flash_kernel import FlashCall
from vllm_accel.backends.library import Found


class _Fmha:
    """The functions of an installed library, and masks without a synchronisation."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def attend(self, operator: str, tensors: dict[str, Tensor], mask: Any, scale: float, need_lse: bool) -> Any:
        """Return out and lse (None unless needed)."""
        options = {"attn_bias": mask, "p": 0.0, "scale": scale, "op": self._found[operator]}
        if need_lse:
            return self._found["memory_efficient_attention_forward_requires_grad"](**tensors, **options)
        return self._found["memory_efficient_attention_forward"](**tensors, **options), None

    def gradients(self, operator: str, tensors: dict[str, Tensor], mask: Any, scale: float) -> Any:
        """Return dq, dk, dv."""
        function = self._found["memory_efficient_attention_backward"]
        return function(**tensors, attn_bias=mask, p=0.0, scale=scale, op=self._found[operator])

    def mask(self, name: str, **fields: Any) -> Any:
        """Build a mask object."""
        return self._found[name](**fields)

    def blocks(self, name: str, cu_seqlens: tuple[Tensor, Tensor], longest: tuple[int, int], **fields: Any) -> Any:
        """Build a mask of packed sequences from device tensors.

        The library's own constructors want Python lists, which would cost a synchronisation. Both operators read the
        tensor and the maximum alone; the list only feeds checks and `materialize`, so it says "no sequence".
        """
        q_seqinfo, k_seqinfo = (self._lengths(*of) for of in zip(cu_seqlens, longest, strict=True))
        return self.mask(name, q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo, **fields)

    def _lengths(self, cu_seqlens: Tensor, longest: int) -> Any:
        return self.mask("_SeqLenInfo", seqstart=cu_seqlens, max_seqlen=longest, min_seqlen=0, seqstart_py=[0])


class FmhaFlash:
    """The FlashAttention operators of the library."""

    def __init__(self, found: Found) -> None:
        self._fmha = _Fmha(found)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor | None, None]:
        """Return out and lse. Grouped heads go in as (B, S, G, H, D), keys expanded by stride 0, which it unfolds."""
        mask, packed, kv_heads = self._mask(call), call.cu_seqlens_q is not None, k.shape[-2]
        grouped = q.shape[-2] != kv_heads
        if packed and not k.shape[0]:
            k, v = (t.new_zeros((1, *t.shape[1:])) for t in (k, v))  # without any key it leaves the log-sum-exp unset
        if packed:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        if grouped:
            q = q.unflatten(-2, (kv_heads, -1))
            k, v = (t.unsqueeze(-2).expand(*t.shape[:-1], q.shape[-2], t.shape[-1]) for t in (k, v))
        tensors = {"query": q, "key": k, "value": v}
        out, lse = self._fmha.attend("flash.FwOp", tensors, mask, call.softmax_scale, call.need_lse)
        if grouped:
            out, lse = out.flatten(-3, -2), None if lse is None else lse.flatten(1, 2)
        if packed:
            out, lse = out[0], None if lse is None else lse[0]
        return out, lse, None

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, dout: Tensor,
        call: FlashCall,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the gradients; the backward operator has no grouped heads."""
        heads, kv_heads = q.shape[-2], k.shape[-2]
        k, v = expand_heads(k, heads), expand_heads(v, heads)
        tensors = {"grad": dout, "output": out, "lse": lse, "query": q, "key": k, "value": v}
        packed = call.cu_seqlens_q is not None
        if packed:
            tensors = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
        dq, dk, dv = self._fmha.gradients("flash.BwOp", tensors, self._mask(call), call.softmax_scale)
        if packed:
            dq, dk, dv = dq[0], dk[0], dv[0]
        return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)

    def _mask(self, call: FlashCall) -> Any:
        left, right, fmha = call.window_left, call.window_right, self._fmha
        window = {} if left < 0 else {"_window_size": left + 1}  # theirs counts the key on the diagonal
        if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
            name = "BlockDiagonalMask"
            if call.causal:
                local = "LocalAttention" if window else ""
                name = f"BlockDiagonalCausal{local}FromBottomRightMask"
            cu_seqlens, longest = (call.cu_seqlens_q, call.cu_seqlens_k), (call.max_seqlen_q, call.max_seqlen_k)
            return fmha.blocks(name, cu_seqlens, longest, **window)
        if call.causal:
            local = "LocalAttention" if window else ""
            return fmha.mask(f"LowerTriangularFromBottomRight{local}Mask", **window)
        if left < 0 and right < 0:
            return None
        # No side may be unlimited; the number of keys is as good.
        left, right = (call.max_seqlen_k if side < 0 else side for side in (left, right))
        return fmha.mask("LocalAttentionFromBottomRightMask", window_left=left, window_right=right)


class FmhaCutlass:
    """The CUTLASS operators of the library."""

    def __init__(self, found: Found) -> None:
        self._fmha = _Fmha(found)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, None]:
        """Return out and lse padded to a multiple of 32."""
        tensors = {"query": q, "key": k, "value": v}
        out, lse = self._fmha.attend("cutlass.FwOp", tensors, self._mask(call), call.softmax_scale, call.need_lse)
        return out, out.new_empty(0) if lse is None else lse, None

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rng: Tensor | None, dout: Tensor, call: Call,
        bias_grad: bool,
    ) -> Grads:  # fmt: skip
        """Return the gradients."""
        tensors = {"grad": dout, "output": out, "lse": lse, "query": q, "key": k, "value": v}
        dq, dk, dv = self._fmha.gradients("cutlass.BwOp", tensors, self._mask(call), call.softmax_scale)
        return dq, dk, dv, None

    def _mask(self, call: Call) -> Any:
        fmha, packed, local = self._fmha, call.packed, "LocalAttention" if call.window else ""
        window = {"_window_size": call.window} if call.window else {}
        if packed is not None:
            name = "BlockDiagonalMask"
            if call.causal:
                # The backward operator takes a window with the top-left mask alone.
                name = f"BlockDiagonalCausal{local}{'' if call.square else 'FromBottomRight'}Mask"
            cu_seqlens, longest = (packed.cu_seqlens_q, packed.cu_seqlens_k), (packed.max_seqlen_q, packed.max_seqlen_k)
            return fmha.blocks(name, cu_seqlens, longest, **window)
        if call.causal and call.bias is not None:
            return fmha.mask("LowerTriangularMaskWithTensorBias", bias=call.bias)
        return fmha.mask(f"LowerTriangularFromBottomRight{local}Mask", **window) if call.causal else call.bias
