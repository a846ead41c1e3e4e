#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command: conformance of every installed backend against float64, fakes
# against the real operators, the GPU tests, and the benchmarks. Leaves its results in the folder given (default: out).
#
#   benchmarks/gpu_session.sh [FOLDER] [PYTHON]
set -u
out=${1:-out}
python=${2:-python3}
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
status=0

step() { # name, seconds allowed, command...
  local name=$1 limit=$2
  shift 2
  echo "=== $name: $*"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  tail -n 25 "$out/$name.log"
  echo "=== $name ended with $rc"
  [ $rc -eq 0 ] || status=1
}

step conformance 240 "$python" -m vllm_accel.testing --where cuda --json "$out/conformance.json"
step gpu_tests 240 "$python" -m pytest -q -p no:cacheprovider -o filterwarnings=default tests/test_gpu.py \
  -k "not right_or_says" --tb=short
step fakes 200 "$python" tests/fakes/check_on_gpu.py
step dispatch 120 "$python" -m benchmarks.dispatch --json "$out/dispatch.json"
step attention 240 "$python" -m benchmarks.attention --gpu --json "$out/attention.json"
exit $status
