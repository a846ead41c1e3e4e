"""A stand-in for flashinfer 0.7.2 on CPU tensors: the paged prefill wrapper and the TensorRT-LLM functions.

Read in flashinfer-python 0.7.2.post1: prefill.py, decode.py, xqa.py and mla/_core.py (signatures, checks, scales, forms
of the log-sum-exp), data/include/flashinfer (page.cuh: a length is ``(pages - 1) * page_size + last_page_len``;
scheduler.cuh and prefill.cuh: keys past the planned chunks are not visited), data/csrc/xqa (dense q, out, table; zero
scratch). Modelled: the FlashAttention 2 template in CUDA-graph mode; XQA and trtllm-gen with NHD caches. A sequence
without keys is not spoken of there: its rows are garbage here.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fakes import kernel
from fakes.kernel import INF, check

__version__ = "0.7.2.post1"

# The GPU that this stand-in pretends to run on; a test may set it.
COMPUTE_CAPABILITY = (9, 0)

_HALF = (torch.float16, torch.bfloat16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _unmodelled(given: dict[str, object], **defaults: object) -> None:
    for name, default in defaults.items():
        if given[name] is not default and given[name] != default:
            raise NotImplementedError(f"the fake does not model {name}={given[name]!r}")


def _garbage_like(*shape: int, dtype: torch.dtype) -> Tensor:
    return kernel.garbage(*shape, dtype=dtype)


def _keys(cache: Tensor, pages: list[int], length: int) -> Tensor:
    """Read a sequence's keys, no page more than it needs."""
    needed = torch.tensor(pages[: -(-length // cache.shape[1])], dtype=torch.long)
    check(not ((needed < 0) | (needed >= cache.shape[0])).any(), "CUDA error: an illegal memory access was encountered")
    return cache[needed].double().flatten(0, 1)[:length]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window_left: int, softcap: float, causal: bool, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out (Sq, H, Dv) and the natural lse (Sq, H)."""
    visible = kernel.band(q.shape[0], k.shape[0], None if window_left < 0 else window_left, 0 if causal else None)
    out, lse = kernel.forward(
        q.double()[None], k[None], v[None], scale=scale, visible=visible, softcap=softcap, sink=sinks
    )
    return out[0], lse[0].t()


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
        jit_args=None,
        jit_kwargs=None,
        variant_owns_mask=False,
    ):
        _unmodelled(
            locals(), kv_layout="NHD", custom_mask_buf=None, mask_indptr_buf=None, jit_args=None, jit_kwargs=None,
            variant_owns_mask=False,
        )  # fmt: skip
        if not use_cuda_graph or backend != "fa2":
            raise NotImplementedError("the fake models the fa2 backend in CUDA-graph mode alone")
        for name, buffer in (("qo_indptr", qo_indptr_buf), ("paged_kv_indptr", paged_kv_indptr_buf)):
            if not torch.is_tensor(buffer):
                raise ValueError(f"{name}_buf should be a torch.Tensor in CUDA graph mode")
        self._batch = len(qo_indptr_buf) - 1
        if len(paged_kv_indptr_buf) != self._batch + 1 or len(paged_kv_last_page_len_buf) != self._batch:
            raise ValueError("The length of paged_kv_indptr_buf should be batch_size + 1.")
        if float_workspace_buffer.numel() * float_workspace_buffer.element_size() < 1 << 20:
            raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")
        self._qo_indptr, self._indptr = qo_indptr_buf, paged_kv_indptr_buf
        self._indices, self._last = paged_kv_indices_buf, paged_kv_last_page_len_buf
        self._planned: list[int] | None = None

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
        prefix_len_ptr=None,
        token_pos_in_items_ptr=None,
        token_pos_in_items_len=0,
        max_item_len_ptr=None,
        seq_lens=None,
        seq_lens_q=None,
        block_tables=None,
        max_token_per_sequence=None,
        max_sequence_kv=None,
        fixed_split_size=None,
        disable_split_kv=False,
        uniform_q_len=None,
    ):
        _unmodelled(
            locals(), head_dim_vo=None, custom_mask=None, packed_custom_mask=None, pos_encoding_mode="NONE",
            use_fp16_qk_reduction=False, prefix_len_ptr=None, seq_lens=None, block_tables=None, fixed_split_size=None,
            disable_split_kv=False,
        )  # fmt: skip
        for x in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len):
            check(x.device.type == "cpu" and x.dtype == torch.int32, "plan copies these to the host otherwise: a sync")
        if len(qo_indptr) - 1 != self._batch:
            raise ValueError("The batch size should be fixed during the lifecycle of the wrapper in cuda graph mode")
        if len(paged_kv_indices) > len(self._indices):
            raise ValueError("The length of paged_kv_indices exceeds the allocated buffer size.")
        check(head_dim_qk in (64, 128, 256, 512), f"Unsupported head_dim: {head_dim_qk}")
        check(num_qo_heads % num_kv_heads == 0, "num_qo_heads should be divisible by num_kv_heads")
        self._qo_indptr.copy_(qo_indptr)
        self._indptr.copy_(paged_kv_indptr)
        self._last.copy_(paged_kv_last_page_len)
        self._indices[: len(paged_kv_indices)].copy_(paged_kv_indices)
        pages = (paged_kv_indptr[1:] - paged_kv_indptr[:-1]).tolist()
        self._planned = [n * page_size for n in pages]
        self._rows = int(qo_indptr[-1])
        check(self._rows == self._batch, "the fake models one query row for each sequence")
        self._heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self._mask = (window_left, logits_soft_cap or 0.0, causal)
        self._dtypes = (q_data_type, kv_data_type or q_data_type, o_data_type or q_data_type)

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        lse_base="log2",
        lse_layout="NH",
        enable_pdl=None,
        window_left=None,
        sinks=None,
        kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None,
        uses_spcompress=None,
    ):
        _unmodelled(
            locals(), q_scale=None, k_scale=None, v_scale=None, lse=None, window_left=None, sinks=None,
            kv_cache_sf=None, skip_softmax_threshold_scale_factor=None,
        )  # fmt: skip
        check(self._planned is not None, "plan info is not initialized")
        k_cache, v_cache = paged_kv_cache
        heads, kv_heads, dim, page_size = self._heads
        if q.dtype != self._dtypes[0] or k_cache.dtype != self._dtypes[1]:
            raise ValueError("The dtype of q does not match the q_data_type specified in plan function.")
        check(q.dtype in _HALF and k_cache.dtype in (q.dtype, *_FP8), "dtypes that the template does not take")
        if q.shape[0] != self._rows:
            raise ValueError(f"q.shape[0] ({q.shape[0]}) does not match qo_indptr[-1] ({self._rows}).")
        check(q.shape[1:] == (heads, dim) and k_cache.shape[1:] == (page_size, kv_heads, dim), "planned other sizes")
        check(out is None or (out.shape == q.shape and out.dtype == self._dtypes[2]), "out has the wrong shape")
        kernel.check_aligned(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
        out = torch.zeros_like(q) if out is None else out
        sums = kernel.garbage(self._rows, heads, dtype=torch.float32)
        starts, last, table = self._indptr.tolist(), self._last.tolist(), self._indices.tolist()
        left, softcap, causal = self._mask
        for row, planned in enumerate(self._planned):
            pages = starts[row + 1] - starts[row]
            length = (pages - 1) * page_size + last[row] if pages else 0
            check(pages == 0 or 1 <= last[row] <= page_size, "last_page_len is between 1 and page_size")
            own = table[starts[row] : starts[row + 1]]
            k, v = (_keys(cache, own, length) for cache in (k_cache, v_cache))
            if length > planned:  # the chunks past it are nobody's work
                k, v = k[:planned], v[:planned]
            out_row, lse_row = _attend(q[row : row + 1], k, v, self._scale, left, softcap, causal, None)
            out[row], sums[row] = out_row[0].to(out.dtype), lse_row[0].float() / math.log(2)
        if not return_lse:
            return out
        sums = sums * math.log(2) if lse_base == "ln" else sums
        return out, (sums.t().contiguous() if lse_layout == "HN" else sums)


def _check_tables(query: Tensor, tables: Tensor, seq_lens: Tensor, batch: int) -> None:
    check(tables.dtype == torch.int32 and tables.is_contiguous(), "the table is read as dense int32")
    check(tables.shape[0] == batch and tuple(seq_lens.shape) == (batch,), "one row of the table for each sequence")
    check(seq_lens.dtype in (torch.int32, torch.uint32) and seq_lens.is_contiguous(), "seq_lens is read as 32 bits")
    check(query.is_contiguous(), "the query is read as dense memory")


def _check_scratch(workspace: Tensor) -> None:
    check(workspace.numel() * workspace.element_size() >= 16 << 20, "the scratch memory is too small")
    check(not bool(workspace.view(torch.uint8)[: 8 << 20].any()), "semaphores that are not zero: the kernel hangs")


def xqa_batch_decode_with_kv_cache(
    query,
    kv_cache,
    workspace_buffer,
    block_tables,
    seq_lens,
    max_seq_len,
    bmm1_scale=1.0,
    bmm2_scale=1.0,
    window_left=-1,
    out=None,
    sinks=None,
    kv_layout="NHD",
    enable_pdl=None,
    q_len_per_req=1,
    o_scale=1.0,
    mask=None,
    kv_cache_sf=None,
    q_cu_seq_lens=None,
):
    _unmodelled(
        locals(), kv_layout="NHD", q_len_per_req=1, o_scale=1.0, mask=None, kv_cache_sf=None, q_cu_seq_lens=None
    )
    check(COMPUTE_CAPABILITY[0] in (9, 10, 12), "XQA is only supported on SM90, SM100, SM120/SM121 GPUs")
    k_cache, v_cache = kv_cache
    page_size, kv_heads, dim = k_cache.shape[1:]
    group = query.shape[1] // kv_heads
    check(query.dtype in _HALF, "only float16 and bfloat16 input are supported")
    check(k_cache.dtype == v_cache.dtype and k_cache.dtype in (query.dtype, torch.float8_e4m3fn), "cache dtype")
    if page_size not in (16, 32, 64, 128):
        raise ValueError(f"Invalid page_size: {page_size}, only 16, 32, 64, 128 are supported")
    if dim % 16 or not 16 <= dim <= 512 or v_cache.shape[-1] != dim:
        raise ValueError(f"Invalid head_dim: {dim}, must be divisible by 16 and in range [16, 512]")
    check(group <= 32, "nbValidRows <= warpTile.y")
    check(isinstance(bmm1_scale, float) and isinstance(bmm2_scale, float), "the fake models scales on the host")
    check(bmm2_scale == 1.0 or k_cache.dtype in _FP8, "a cache that is not quantised is not scaled")
    _check_tables(query, block_tables, seq_lens, query.shape[0])
    _check_scratch(workspace_buffer)
    if sinks is not None:
        check(sinks.dtype == torch.float32 and sinks.is_contiguous() and sinks.numel() == query.shape[1], "sinks")
    check(out is None or (out.is_contiguous() and out.shape == query.shape), "out is written as dense memory")
    kernel.check_aligned(query=query, k_cache=k_cache, v_cache=v_cache, out=out)
    out = torch.empty_like(query) if out is None else out
    out.fill_(math.nan)
    for row, (pages, length) in enumerate(zip(block_tables.tolist(), seq_lens.tolist(), strict=True)):
        if length:
            k, v = (_keys(cache, pages, length) for cache in (k_cache, v_cache))
            # The kernel takes sqrt(dim) back out, and applies the second factor to both products of a quantised cache.
            one = _attend(query[row : row + 1], k, v * bmm2_scale, bmm1_scale, window_left, 0.0, False, sinks)
            out[row] = one[0][0].to(out.dtype)
    return out


def _gen(
    query: Tensor, caches: tuple[Tensor, Tensor], tables: Tensor, seq_lens: Tensor, ends: list[int], scales: tuple,
    window_left: int, causal: bool, out: Tensor, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Fill out and return lse (T, H) in base 2. Whole pages are loaded: 0 * NaN is NaN."""
    k_cache, v_cache = caches
    lse = kernel.garbage(*out.shape[:2], dtype=torch.float32)
    out.fill_(math.nan)
    for b, (pages, length) in enumerate(zip(tables.tolist(), seq_lens.tolist(), strict=True)):
        rows, page_size = slice(ends[b], ends[b + 1]), k_cache.shape[1]
        if not length or rows.start == rows.stop:
            continue
        whole = -(-length // page_size) * page_size
        poisoned = bool(_keys(v_cache, pages, whole)[length:].isnan().any())
        k, v = (_keys(cache, pages, length) for cache in (k_cache, v_cache))
        one, one_lse = _attend(query[rows], k, v * scales[1], scales[0], window_left, 0.0, causal, sinks)
        unseen = one_lse == -INF  # nothing is said of such rows
        out[rows] = torch.where(unseen[..., None], math.nan, one).to(out.dtype) if not poisoned else math.nan
        lse[rows] = torch.where(unseen, math.nan, one_lse / math.log(2)).float()
    return lse


def _check_gen(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor | None, workspace: Tensor, tables: Tensor,
    seq_lens: Tensor, batch: int,
) -> Tensor:  # fmt: skip
    check(COMPUTE_CAPABILITY[0] == 10, "no trtllm-gen binaries for this GPU")
    check(query.dtype in _HALF and k_cache.dtype in (query.dtype, torch.float8_e4m3fn), "Missing TRTLLM-GEN kernel")
    check(k_cache.shape[1] in (16, 32, 64), "Missing TRTLLM-GEN kernel")
    check(k_cache.shape[-1] in (64, 128) and v_cache.shape == k_cache.shape, "Missing TRTLLM-GEN kernel")
    _check_tables(query, tables, seq_lens, batch)
    _check_scratch(workspace)
    kernel.check_aligned(query=query, k_cache=k_cache, v_cache=v_cache, out=out)
    return torch.empty_like(query) if out is None else out


def trtllm_batch_decode_with_kv_cache(
    query,
    kv_cache,
    workspace_buffer,
    block_tables,
    seq_lens,
    max_seq_len,
    bmm1_scale=1.0,
    bmm2_scale=1.0,
    window_left=-1,
    out=None,
    out_dtype=None,
    o_sf_scale=None,
    o_sf_vec_size=None,
    sinks=None,
    kv_layout="HND",
    enable_pdl=None,
    backend="auto",
    q_len_per_req=1,
    o_scale=1.0,
    mask=None,
    max_q_len=None,
    cum_seq_lens_q=None,
    skip_softmax_threshold_scale_factor=None,
    kv_cache_sf=None,
    uses_shared_paged_kv_idx=True,
    lse=None,
    return_lse=False,
    bmm1_scale_log2=None,
    multi_ctas_kv_counter_buffer=None,
    enable_block_sparse_attention=False,
    cp_world=1,
    cp_rank=0,
    causal_seqlens_kv_global=None,
    bf16q_fp8kv_transform_mode=None,
    request_order=None,
    request_order_plan=None,
):
    _unmodelled(
        locals(), sinks=None, kv_layout="NHD", backend="trtllm-gen", q_len_per_req=1, o_scale=1.0, mask=None,
        max_q_len=None, cum_seq_lens_q=None, lse=None, bmm1_scale_log2=None, out_dtype=None,
        enable_block_sparse_attention=False, cp_world=1,
    )  # fmt: skip
    out = _check_gen(query, *kv_cache, out, workspace_buffer, block_tables, seq_lens, query.shape[0])
    ends = list(range(query.shape[0] + 1))
    scales = (bmm1_scale, bmm2_scale)
    sums = _gen(query, kv_cache, block_tables, seq_lens, ends, scales, window_left, True, out, None)
    return (out, sums) if return_lse else out


def trtllm_batch_context_with_kv_cache(
    query,
    kv_cache,
    workspace_buffer,
    block_tables,
    seq_lens,
    max_q_len,
    max_kv_len,
    bmm1_scale,
    bmm2_scale,
    batch_size,
    cum_seq_lens_q,
    cum_seq_lens_kv,
    window_left=-1,
    out=None,
    out_dtype=None,
    o_sf_scale=None,
    o_sf_vec_size=None,
    kv_layout="HND",
    enable_pdl=None,
    sinks=None,
    kv_cache_sf=None,
    skip_softmax_threshold_scale_factor=None,
    uses_shared_paged_kv_idx=True,
    causal=True,
    lse=None,
    return_lse=False,
    multi_ctas_kv_counter_buffer=None,
    use_fp16_softmax=None,
    uses_spcompress=None,
    backend="trtllm-gen",
):
    _unmodelled(locals(), sinks=None, kv_layout="NHD", backend="trtllm-gen", lse=None, out_dtype=None)
    if not causal and window_left != -1:
        raise ValueError("non-causal currently requires window_left == -1")
    out = _check_gen(query, *kv_cache, out, workspace_buffer, block_tables, seq_lens, batch_size)
    ends = cum_seq_lens_q.tolist()
    lengths = (cum_seq_lens_kv[1:] - cum_seq_lens_kv[:-1]).tolist()
    check(lengths == seq_lens.tolist() and int(cum_seq_lens_kv[0]) == 0, "cum_seq_lens_kv must agree with seq_lens")
    longest = max((end - start for start, end in itertools.pairwise(ends)), default=0)
    check(longest <= max_q_len and max(lengths) <= max(max_kv_len, 1), "the maxima must cover every sequence")
    scales = (bmm1_scale, bmm2_scale)
    sums = _gen(query, kv_cache, block_tables, seq_lens, ends, scales, window_left, causal, out, None)
    return (out, sums) if return_lse else out


def trtllm_batch_decode_with_kv_cache_mla(
    query,
    kv_cache,
    workspace_buffer,
    qk_nope_head_dim,
    kv_lora_rank,
    qk_rope_head_dim,
    block_tables,
    seq_lens,
    max_seq_len,
    sparse_mla_top_k=0,
    out=None,
    bmm1_scale=1.0,
    bmm2_scale=1.0,
    sinks=None,
    skip_softmax_threshold_scale_factor=None,
    enable_pdl=None,
    backend="auto",
    is_var_seq=True,
    uses_shared_paged_kv_idx=True,
    lse=None,
    return_lse=False,
    cute_dsl_impl="auto",
    kv_scale_format="auto",
    cum_seq_lens_q=None,
    max_q_len=None,
    multi_ctas_kv_counter_buffer=None,
    sparse_mla_top_k_lens=None,
    enable_dcp=False,
    cp_world=1,
    cp_rank=0,
    causal_seqlens_kv_global=None,
    use_fp16_softmax=None,
    return_lse_base=None,
):
    _unmodelled(
        locals(), sparse_mla_top_k=0, out=None, sinks=None, lse=None, cum_seq_lens_q=None, max_q_len=None,
        enable_dcp=False,
    )  # fmt: skip
    major = COMPUTE_CAPABILITY[0]
    check(backend == {10: "trtllm-gen", 12: "xqa"}.get(major), "XQA MLA requires SM120a or SM121a")
    check((kv_lora_rank, qk_rope_head_dim) == (512, 64) and query.dim() == 4 and query.shape[1] == 1, "MLA dimensions")
    check(kv_cache.dim() == 3 and kv_cache.shape[-1] == query.shape[-1] == 576, "Expected head dim 576")
    check(kv_cache.shape[1] in (32, 64), f"Supported block_size are 32 and 64, got {kv_cache.shape[1]}")
    check(query.dtype == kv_cache.dtype == torch.bfloat16, "the fake models bfloat16")
    if backend == "xqa":
        check(query.shape[2] == 128, "Only head group ratio 128 is supported for xqa MLA")
        if return_lse:
            raise NotImplementedError("XQA MLA does not support return_lse")
    check(return_lse_base in (None, "base2", "basee"), "return_lse_base must be 'basee', 'base2', or None")
    _check_tables(query, block_tables, seq_lens, query.shape[0])
    _check_scratch(workspace_buffer)
    tokens, _, heads, _ = query.shape
    result = torch.empty(tokens, heads, kv_lora_rank, dtype=query.dtype)
    caches = (kv_cache.unsqueeze(2), kv_cache.unsqueeze(2)[..., :kv_lora_rank])
    ends = list(range(tokens + 1))
    scales = (bmm1_scale, bmm2_scale)
    sums = _gen(query[:, 0], caches, block_tables, seq_lens, ends, scales, -1, True, result, None)
    result = result.unsqueeze(1)
    return (result, sums * (math.log(2) if return_lse_base == "basee" else 1.0)) if return_lse else result
