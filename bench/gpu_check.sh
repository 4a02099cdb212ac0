#!/usr/bin/env bash
# Two runs on a bare machine with a GPU, each of less than ten minutes:
#
#   bench/gpu_check.sh check OUT    build for sm_90a, probes, GPU tests, calls repeated, small cases
#                                   under compute-sanitizer
#   bench/gpu_check.sh bench OUT    build, probes, whole models beside transformers, every op's real
#                                   shapes beside torch
#
# OUT gets check.json or bench.json, written anew after every step, and check.log or bench.log with
# what the steps printed; a short table comes last on stdout. Every step has its own time limit and
# process; one that fails or hangs does not stop the others, nor does a row the other rows of its step.
# Exit code: 0, 1 where a step failed, 2 for wrong arguments.
#
# The machine needs python3 with torch >= 2.10, triton, numpy, pillow, tokenizers, safetensors and
# pytest, if possible transformers, nvcc 13
# (on the PATH or in /usr/local/cuda/bin), a C++20 compiler, cmake >= 3.28 and compute-sanitizer; no
# network. What else builds the package (pybind11 >= 3, scikit-build-core >= 0.11, ninja), and pytest
# or tokenizers, can be carried where they are missing: put wheels for that machine's Python, with
# the wheels that they need themselves, into the ignored folder .whl/ of the checkout,
#
#   pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux2014_x86_64 -d .whl "pybind11>=3" "scikit-build-core>=0.11" ninja
#
# and they are installed beside the machine's packages, which stay as they are. (The wheel of cmake,
# 29 MiB, does not fit beside the checkout.) The headers that the
# matrix products of Hopper are compiled from are never there; they come as one wheel more, of 6 MB:
#
#   pip download --no-deps -d .whl nvidia-cutlass==4.2.0.0
#
# The checkout itself (tracked files) is all else that has to travel: 64 MiB with the wheels, which the
# step `carried` checks. Nothing is installed outside a temporary folder.
#
# With --dry-run as a third argument nothing is built and the installed package runs the same steps on
# the CPU, with small cases: it proves the script, not the kernels.
set -u -o pipefail

if [[ $# -lt 2 || $# -gt 3 || ! $1 =~ ^(check|bench)$ || (-n ${3:-} && $3 != --dry-run) ]]; then
  echo "usage: $0 check|bench OUT [--dry-run]" >&2
  exit 2
fi
mode=$1
dry=(${3:+"$3"})
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/.." || exit 2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/$mode.log
: >"$log"
: >"$work/steps.tsv"
deadline=$((SECONDS + 540)) # leaves half a minute for the table
export PYTHONUNBUFFERED=1
export PATH=$work/tools/bin:$PATH:/usr/local/cuda/bin
export PYTHONPATH=$work/site:$work/tools${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=$work/triton

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 began=$SECONDS left=$((deadline - SECONDS)) code=124
  shift 2
  ((limit > left)) && limit=$left
  echo "== $name" | tee -a "$log"
  if ((limit > 0)); then
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 </dev/null
    code=$?
  fi
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" >>"$work/steps.tsv"
  python3 bench/gpu_parts.py "$mode" "$work" "$out" 2>>"$log"
  ((code == 0)) || echo "== $name: exit code $code" | tee -a "$log"
}

# The same beside others, a few at a time; each shows its log when it ends. `wait` waits for all.
beside() {
  while (($(jobs -rp | wc -l) >= 4)); do wait -n; done
  (
    log=$work/$BASHPID.log
    export OMP_NUM_THREADS=4
    step "$@"
    cat "$log" >>"$out/$mode.log"
  ) &
}

py() { python3 bench/gpu_check.py "$@" "${dry[@]}"; }
step_py() { step "$1" "$2" python3 bench/gpu_check.py "${@:3}" "${dry[@]}"; }

build() {
  local headers=$work/tools/cutlass_library/source
  if compgen -G '.whl/*.whl' >/dev/null; then
    step wheels 60 python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
      --target "$work/tools" .whl/*.whl
  fi
  step build 300 python3 -m pip install --verbose --no-build-isolation --no-deps --no-index \
    --no-compile --target "$work/site" -C cmake.define.INTERNVL_RT_CUDA=ON \
    -C cmake.define.INTERNVL_RT_CUDA_ARCHS=90a \
    -C cmake.define.INTERNVL_RT_CUTLASS_DIR="$headers" \
    -C cmake.define.INTERNVL_RT_CUTLASS_JOBS=6 .
}

run_check() {
  local tool op pytest=(python3 -m pytest -q -p no:cacheprovider)
  step_py probes 60 probes --out "$work"
  if ((${#dry[@]})); then
    step_py small 60 small
    step_py repeats 60 repeat
    return
  fi
  # Their time is that of Python, of references on the CPU and of Triton's compiler.
  beside "test models" 150 "${pytest[@]}" tests/test_gpu_engine.py -k on_gpu
  for op in $ops; do
    beside "test $op" 120 "${pytest[@]}" tests/test_ops.py -k "on_gpu[$op-"
  done
  beside "test variants" 120 "${pytest[@]}" tests/test_attention.py -k both_variants
  beside "test products" 90 "${pytest[@]}" tests/test_gemm.py -k on_hopper
  beside selftest 60 python3 -m internvl_rt selftest --device cuda
  wait
  step_py repeats 75 repeat
  # Without torch's pool every tensor is an allocation of its own: an access beside it is seen.
  for tool in memcheck racecheck; do
    step "$tool" 115 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --report-api-errors no --error-exitcode 9 python3 bench/gpu_check.py small
  done
}

run_bench() {
  local op shape
  step_py probes 60 probes --out "$work"
  for shape in $( ((${#dry[@]})) && echo tiny || echo internvl3-1b internvl3-8b); do
    step "models $shape" 110 python3 bench/gpu_models.py "$shape" --out "$work" "${dry[@]}"
  done
  for op in $ops; do
    step_py "bench $op" 90 ops "$op" --out "$work"
  done
  step_py "bench peers" 110 peers --out "$work"
}

((${#dry[@]})) || step gpu 20 nvidia-smi
step carried 20 python3 bench/carried.py "${dry[@]}"
((${#dry[@]})) || build
step_py ready 60 ready --out "$work"
ops=$(py names 2>>"$log")
"run_$mode"
py report "$mode" --parts "$work" --out "$out" 2>>"$log"
