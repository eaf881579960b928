#!/usr/bin/env bash
# Proves on a machine with a GPU what the tests elsewhere cannot: kernels, attention backends, CUDA graphs, costs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  cat <<'TEXT'
usage: tests/gpu/prove.sh [--out FOLDER] [--parts NAME,NAME,...] [--quick] [--cpu] [--dry-run]

Sets up .venv with vLLM for GPUs (make venv ENGINE=gpu), runs every part, goes on where one fails, and writes
FOLDER/report.md with each part's result and log. Exit code 0 only if all of them passed.

  --out FOLDER   where report and logs go (default: gpu-proof)
  --parts LIST   only these: machine, units, kernels, families, engine, graphs, bandwidth, bench
  --quick        fewer rounds of the benchmark and one context of the kernels' timing
  --cpu          a rehearsal of the script without a GPU, in the .venv that is there
  --dry-run      print the commands and run none

PYTHON names the interpreter (default: .venv/bin/python).
TEXT
}

out=gpu-proof parts=machine,units,kernels,families,engine,graphs,bandwidth,bench quick= cpu= dry=
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift ;;
    --parts) parts=${2:?--parts needs names}; shift ;;
    --quick) quick=--quick ;;
    --cpu) cpu=--cpu ;;
    --dry-run) dry=1 ;;
    --help | -h) usage; exit 0 ;;
    *) echo "prove.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
  shift
done

python=${PYTHON:-.venv/bin/python}
pytest=("$python" -m pytest -q -p no:cacheprovider)
rounds=(${quick:+--quick})
bench=(--parts "eight,one,long,context,transformers,lens")
timing=(${cpu:+--cpu} ${quick:+--quick})
# The benchmark keeps four servers at once, three of them asleep: each gets a fifth of the GPU.
serve=(--serve "--gpu-memory-utilization 0.2")
if [[ $cpu ]]; then
  serve=()
  bench=(--parts eight)
  rounds=(--quick --rounds 1)
fi

results=() failed=0

# part NAME WHAT COMMAND...: run it if it was chosen, keep its output and its result.
part() {
  local name=$1 what=$2 begin=$SECONDS state=passed
  shift 2
  [[ ,$parts, == *,$name,* ]] || return 0
  if [[ $dry ]]; then
    printf '%s:' "$name"
    printf ' %q' "$@"
    printf '\n'
    return 0
  fi
  echo "==> $name: $what"
  if "$@" >"$out/$name.log" 2>&1; then :; else state="FAILED ($?)" failed=1; fi
  echo "    $state after $((SECONDS - begin)) s, see $out/$name.log"
  results+=("| $name | $what | $state | $((SECONDS - begin)) s |")
}

machine() {
  if [[ ! $cpu ]]; then nvidia-smi; fi
  "$python" -m tracer.cli doctor
}

report() {
  local kind="a GPU"
  if [[ $cpu ]]; then kind="NO GPU: this is a rehearsal of the script and proves nothing"; fi
  echo "# tensorspan on $kind"
  echo
  date -u +"%Y-%m-%d %H:%M UTC"
  echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  echo
  echo "| part | what | result | time |"
  echo "|---|---|---|---|"
  printf '%s\n' "${results[@]}"
  for name in machine graphs bandwidth bench; do
    [[ -f $out/$name.log ]] || continue
    printf '\n## %s\n\n' "$name"
    if [[ $name == machine ]]; then printf '```\n%s\n```\n' "$(cat "$out/$name.log")"; else grep -E '^(\||- |[A-Z#])' "$out/$name.log" || true; fi
  done
  for name in units kernels families engine; do
    [[ -f $out/$name.log ]] || continue
    printf '\n## %s\n\n```\n%s\n```\n' "$name" "$(tail -n 20 "$out/$name.log")"
  done
}

if [[ ! $dry ]]; then
  if [[ ! $cpu ]]; then
    command -v nvidia-smi >/dev/null || { echo "prove.sh: no nvidia-smi, so no GPU; --cpu rehearses without one" >&2; exit 1; }
    make --no-print-directory venv ENGINE=gpu
  fi
  mkdir -p "$out"
fi

part machine "what the machine and the installation are" machine
part units "records, hooks and both runners against vLLM's classes" "${pytest[@]}" tests/worker
part kernels "compiled kernels against torch on the CPU" "${pytest[@]}" tests/gpu/kernels.py
# Triton multiplies float32 in TF32 unless told: then the engine itself is not within 1e-5 of eager.
part families "families by attention backend against Transformers eager" \
  env TRITON_F32_DEFAULT=ieee "${pytest[@]}" tests/gpu/families.py
part engine "batches, scheduling, offline scripts and the server" "${pytest[@]}" tests/integration/test_batches.py \
  tests/integration/test_scheduling.py tests/integration/test_offline.py tests/integration/test_server.py \
  tests/integration/test_concurrency.py
part graphs "steps without a captured request stay on FULL CUDA graphs" \
  "$python" -m tests.gpu.graphs ${cpu:+"$cpu"} --out "$out/graphs.json"
part bandwidth "kernels against the device's copy bandwidth" "$python" -m tests.gpu.bandwidth "${timing[@]}"
part bench "throughput kept, beside plain vLLM in one run" \
  "$python" -m tests.benchmarks.bench "${rounds[@]}" "${bench[@]}" "${serve[@]}" --out "$out"

if [[ ! $dry ]]; then
  report >"$out/report.md"
  echo "==> $out/report.md"
fi
exit "$failed"
