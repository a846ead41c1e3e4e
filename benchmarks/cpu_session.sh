#!/usr/bin/env bash
# Everything that a machine without a GPU can tell in a quarter of an hour or so, in one folder:
#
#     benchmarks/cpu_session.sh OUTDIR [PYTHON]
#
# Conformance, the C++ kernels beside PyTorch's, a model's tokens a second, times and memory by length, products, what a call
# costs, a short tune, the regret of automatic choice, the doctor's probe, and a page made of it. Each step has a time limit and
# a log of its own; one that fails or is cut off leaves what it had, and the next one runs. STEPS="tune selection" runs only
# those; PERCENT=200 doubles every limit. The machine has to be quiet: what was disturbed says so and counts for nothing.
. "$(dirname "$0")/session.sh"

# In order of value: what is cut off by the end of a session is what is missed least.
step cpu_one_thread 170 "$python" -m benchmarks.cpu --threads 1 --rounds 5 --budget 155 --json "$out/cpu_one_thread.json"
step cpu_all_threads 170 "$python" -m benchmarks.cpu --rounds 5 --budget 155 --json "$out/cpu_all_threads.json"
step generate 120 "$python" -m benchmarks.generate --rounds 3 --tokens 8 --json "$out/generate.json"
step tune 70 "$python" -m vllm_accel.cli tune --op attention,paged --device cpu --budget 60s
step selection 130 "$python" -m benchmarks.selection --count 96 --budget 110s --json "$out/selection.json"
step conformance 120 "$python" -m vllm_accel.testing --where cpu --dtypes bf16,fp32 --json "$out/conformance.json"
step gemm_conformance 60 "$python" -m benchmarks.gemm --check --json "$out/gemm_conformance.json"
step gemm 60 "$python" -m benchmarks.gemm --budget 45 --json "$out/gemm.json"
step attention 60 "$python" -m benchmarks.attention --rounds 5 --json "$out/attention.json"
step lengths 60 "$python" -m benchmarks.lengths --device cpu --budget 45 --json "$out/lengths.json"
step memory 90 "$python" -m benchmarks.memory --json "$out/memory.json"
step dispatch 60 "$python" -m benchmarks.dispatch --rounds 60 --device cpu --json "$out/dispatch.json"
step doctor 60 "$python" -m vllm_accel.cli doctor --probe --seconds 40 --json
step report 45 "$python" -m benchmarks.report "$out" --out "$out/report"
cat "$summary"
