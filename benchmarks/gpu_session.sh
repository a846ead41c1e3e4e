#!/usr/bin/env bash
# Everything that a GPU machine can tell in under ten minutes, in one folder:
#
#     benchmarks/gpu_session.sh OUTDIR [PYTHON]
#
# Conformance, the reports of wrong kernels, times, a short tune, the regret of automatic choice, the doctor's probe, and a
# page made of it. Each step has a time limit and a log of its own; one that fails or is cut off leaves what it had, and the
# next one runs. STEPS="known_bad tune" runs only those; PERCENT=200 doubles every limit. Needs no network.
. "$(dirname "$0")/session.sh"

# In order of value: what is cut off by the end of a session is what is missed least.
step known_bad 45 "$python" -m benchmarks.known_bad --seconds 40 --json "$out/known_bad.json"
step triton 90 "$python" -m benchmarks.gpu_triton --out "$out" --budget 80
step conformance 50 "$python" -m vllm_accel.testing --dtypes bf16 --json "$out/conformance.json"
step gemm 40 "$python" -m benchmarks.gemm --gpu --budget 32 --json "$out/gemm_targets.json"
step products 28 "$python" -m benchmarks.gpu_gemm --out "$out" --budget 20
step tune 65 "$python" -m vllm_accel.cli tune --budget 55s
step selection 65 "$python" -m benchmarks.selection --gpu --json "$out/selection.json" --budget 55s
step attention 60 "$python" -m benchmarks.attention --gpu --rounds 5 --json "$out/attention.json"
step lengths 30 "$python" -m benchmarks.lengths --budget 25 --call-seconds 0.3 --json "$out/lengths.json"
step dispatch 30 "$python" -m benchmarks.dispatch --rounds 60 --json "$out/dispatch.json"
step doctor 50 "$python" -m vllm_accel.cli doctor --probe --seconds 40 --json
step report 45 "$python" -m benchmarks.report "$out" --out "$out/report"
cat "$summary"
