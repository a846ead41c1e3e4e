# Sourced by gpu_session.sh and cpu_session.sh with their arguments: OUTDIR [PYTHON].
set -u
out=${1:?usage: $0 OUTDIR [PYTHON]}
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

