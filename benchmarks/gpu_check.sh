#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command:
#
#   benchmarks/gpu_check.sh [--out DIR] [--parts PART,PART,...]
#
#   build      both libraries, for the GPU of this machine (build/gpu; nothing is installed or downloaded)
#   test       tests/gpu and every other test marked `gpu`
#   operators  the operators' CPU tests, with this machine's torch
#   sanitize   compute-sanitizer (memcheck, racecheck, synccheck, initcheck) on small shapes of each kernel's branches
#   races      the same branches a thousand times, beside other work on the device: always the same bits
#   bench      every operator beside what it replaces, with the device's own limits
#
# Each part ends within LIMIT seconds (540) or is stopped; all are run unless --parts names some. A short table comes
# last; DIR (build/gpu-check) receives check.txt (that table), a log of each part, and results.csv. Exit code: 0 when every
# part passed or could not be asked ("refused", "no device"), 1 otherwise.
#
# Needs python3 with torch, cmake, ninja, pytest and hypothesis; nvcc for CUDA. Without a device it goes as far as a
# CPU can: it builds, collects the tests and times the CPU kernels.
set -u -o pipefail

cd "$(dirname "$0")/.."
OUT=build/gpu-check
PARTS=build,test,operators,sanitize,races,bench
LIMIT=${LIMIT:-540}
PYTHON=${PYTHON:-python3}
while [ $# -gt 0 ]; do
  case $1 in
    --out) OUT=$2 ;;
    --parts) PARTS=$2 ;;
    *) echo "gpu_check.sh: unknown argument $1 (see the top of this file)" >&2; exit 2 ;;
  esac
  shift 2 2>/dev/null || { echo "gpu_check.sh: $1 needs a value" >&2; exit 2; }
done
for part in ${PARTS//,/ }; do
  case $part in
    build | test | operators | sanitize | races | bench) ;;
    *) echo "gpu_check.sh: --parts: no part is called $part (build, test, operators, sanitize, races, bench)" >&2; exit 2 ;;
  esac
done
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
TABLE=$OUT/check.txt

export SOFTDIMO_LIBRARY_DIR=$PWD/build/gpu/lib PYTHONPATH=$PWD PYTHONUNBUFFERED=1
DEVICE=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")')
PYTEST="$PYTHON -m pytest -q -p no:cacheprovider"
if $PYTHON -c 'import xdist' 2>/dev/null; then WORKERS="-n $(nproc)"; else WORKERS=; fi

# part's name, what it printed last
note() { printf '%-10s %-8s %5ss  %s\n' "$1" "$2" "$3" "$4" | tee -a "$TABLE"; }

# run PART COMMAND...: its log, its line of the table. Exit code 77 means that it could not be asked.
run() {
  local part=$1 start=$SECONDS code
  shift
  timeout --kill-after=10 "$LIMIT" "$@" >"$OUT/$part.log" 2>&1
  code=$?
  case $code in
    0) code=passed ;;
    77) code=refused ;;
    124 | 137) code=timeout ;;
    *) code=failed ;;
  esac
  note "$part" "$code" $((SECONDS - start)) "$(grep -v '^ *$' "$OUT/$part.log" | tail -1 | cut -c1-150)"
}

build() {
  local arch
  arch=$($PYTHON -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")')
  case $arch in
    90) arch="-DCMAKE_CUDA_ARCHITECTURES=90a-real" ;;
    "") ;; # no device: all that are shipped
    *) arch="-DCMAKE_CUDA_ARCHITECTURES=$arch-real" ;;
  esac
  cmake -S . -B build/gpu -G Ninja $arch -DTORCH_ROOT="$($PYTHON -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')" &&
    cmake --build build/gpu &&
    $PYTHON -c 'from softdimo_fast.ops import _library as l
print("CPU", l.cpu_isa(), "| CUDA", " ".join(l.compiled_cuda_archs()) or l.CUDA_OBSTACLE)'
}

sanitize() {
  if [ "$DEVICE" = none ]; then echo "no device"; return 77; fi
  if ! command -v compute-sanitizer >/dev/null; then echo "compute-sanitizer is not on PATH"; return 77; fi
  # Without torch's caching, an overrun leaves its own allocation and is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local tool summary=""
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    timeout $((LIMIT / 4)) compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
      $PYTEST -x tests/gpu/test_branches.py -k "not repeats" >"$OUT/sanitizer.tmp" 2>&1
    local code=$?
    cat "$OUT/sanitizer.tmp"
    if grep -q -E "Device not supported|Failed to initialize|not permitted" "$OUT/sanitizer.tmp"; then
      summary+=" $tool:refused"
    elif [ $code -ne 0 ]; then
      rm "$OUT/sanitizer.tmp"; echo "$tool failed (exit code $code)"; return 1
    else
      summary+=" $tool:clean"
    fi
  done
  rm "$OUT/sanitizer.tmp"
  echo "$summary"
}

bench() {
  local device=cuda
  if [ "$DEVICE" = none ]; then device=cpu; fi
  # Kept beside the log, and cut off before the part's own limit: finished cases are in the table.
  rm -rf build/gpu-bench
  timeout --signal=INT $((LIMIT - 30)) $PYTHON -m softdimo_fast.benchmark --device "$device" --out build/gpu-bench ${BENCH_ARGS:-}
  local code=$?
  find build/gpu-bench -maxdepth 1 -name '*.csv' -exec cp {} "$OUT/results.csv" \;
  find build/gpu-bench -maxdepth 1 \( -name '*.md' -o -name '*.html' \) -exec cp {} "$OUT/" \;
  return $code
}

export -f build sanitize bench
export OUT LIMIT PYTHON PYTEST DEVICE
{
  echo "device     $DEVICE"
  echo "driver     $(nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem --format=csv,noheader 2>/dev/null || echo none)"
  $PYTHON -c 'import sys, torch; print("versions   Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)'
  echo "nvcc       $(nvcc --version 2>/dev/null | tail -1 || echo none)"
  echo "commit     $(git describe --always --dirty 2>/dev/null || echo unknown)"
} | tee "$TABLE"
for part in ${PARTS//,/ }; do
  case $part in
    build | sanitize | bench) run "$part" bash -c "$part" ;;
    test) run test $PYTEST -m gpu tests/gpu tests/ops ;;
    operators) run operators env OMP_NUM_THREADS=1 $PYTEST $WORKERS -m "not gpu" tests/ops ;;
    races) run races $PYTEST -k repeats tests/gpu/test_branches.py ;;
  esac
done
! grep -q -E '^[a-z]+ +(failed|timeout)' "$TABLE"
