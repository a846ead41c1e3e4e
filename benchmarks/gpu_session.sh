#!/usr/bin/env bash
# Everything that a GPU machine can tell in under ten minutes, in one folder:
#
#     benchmarks/gpu_session.sh OUTDIR [PYTHON]
#
# Conformance, the reports of wrong kernels, times, a short tune, the regret of automatic choice, the doctor's probe, and a
# page made of it. Each step has a time limit and a log of its own; one that fails or is cut off leaves what it had, and the
# next one runs. STEPS="known_bad tune" runs only those; PERCENT=200 doubles every limit. Needs no network.
set -u
out=${1:?usage: benchmarks/gpu_session.sh OUTDIR [PYTHON]}
python=${2:-python3}
percent=${PERCENT:-100}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out" && out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" VLLM_ACCEL_TABLES="${VLLM_ACCEL_TABLES:-$out/tables}"
summary=$out/summary.tsv
printf 'step\tseconds\texit\n' >"$summary"

# step NAME SECONDS COMMAND...: run with a limit, keep the output, never stop the session.
step() {
  local name=$1 limit=$(($2 * percent / 100 + 1)) code begin=$SECONDS
  shift 2
  case " ${STEPS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  printf '== %s (at most %s s): %s\n' "$name" "$limit" "$*"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  printf '%s\t%s\t%s\n' "$name" "$((SECONDS - begin))" "$code" >>"$summary"
  tail -n 3 "$out/$name.log"
  printf -- '-- %s: %s s, exit %s%s\n' "$name" "$((SECONDS - begin))" "$code" "$([ "$code" = 124 ] && echo ' (cut off)')"
}

# In order of value: what is cut off by the end of a session is what is missed least.
step known_bad 45 "$python" -m benchmarks.known_bad --seconds 40 --json "$out/known_bad.json"
step triton 90 "$python" -m benchmarks.gpu_triton --out "$out" --budget 80
step conformance 50 "$python" -m vllm_accel.testing --dtypes bf16 --json "$out/conformance.json"
step gemm 50 "$python" -m benchmarks.gpu_gemm --out "$out" --budget 40
step tune 65 "$python" -m vllm_accel.cli tune --budget 55s
step selection 65 "$python" -m benchmarks.selection --gpu --json "$out/selection.json" --budget 55s
step attention 60 "$python" -m benchmarks.attention --gpu --rounds 5 --json "$out/attention.json"
step lengths 30 "$python" -m benchmarks.lengths --budget 25 --call-seconds 0.3 --json "$out/lengths.json"
step dispatch 30 "$python" -m benchmarks.dispatch --rounds 60 --json "$out/dispatch.json"
step doctor 50 "$python" -m vllm_accel.cli doctor --probe --seconds 40 --json
step report 45 "$python" -m benchmarks.report "$out" --out "$out/report"
cat "$summary"
