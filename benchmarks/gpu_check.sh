#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command:
#
#   benchmarks/gpu_check.sh [--out DIR] [--parts PART,PART,...] [--operators NAME,NAME,...]
#
#   build      both libraries, for the GPU of this machine (build/gpu; nothing is installed or downloaded)
#   test       tests/gpu and every other test marked `gpu`, but for the repeats
#   operators  the operators' CPU tests, with this machine's torch
#   memcheck, racecheck, synccheck, initcheck
#              compute-sanitizer, on every branch of every kernel (tests/support/branches)
#   races      the same branches a thousand times, beside other work on the device: always the same bits
#   bench      every operator beside what it replaces, with the device's own limits; floors.md has what was predicted
#
# Each part ends within LIMIT seconds (540) or is stopped; all are run unless --parts names some, for all operators
# unless --operators names some. A short table comes last; DIR (build/gpu-check) receives check.txt (that table), a log
# of each part, and results.csv. Exit code: 0 when every part passed or could not be asked ("refused", "no device"), 1
# otherwise.
#
# A repeat takes a millisecond or so, most of it the host's: 400 branches (six operators) need some 400 s for their
# thousand. Beyond the limit each branch stops at its share of the time, and its log says how often it ran: give
# --operators a part of them at a time, or LIMIT more seconds.
#
# Needs python3 with torch, cmake, ninja, pytest and hypothesis; nvcc for CUDA. Without a device it goes as far as a
# CPU can: it builds, calls the branches and times the CPU kernels.
set -u -o pipefail

cd "$(dirname "$0")/.."
OUT=build/gpu-check
PARTS=build,test,operators,memcheck,racecheck,synccheck,initcheck,races,bench
KNOWN=$PARTS
OPERATORS=
LIMIT=${LIMIT:-540}
PYTHON=${PYTHON:-python3}
while [ $# -gt 0 ]; do
  case $1 in
    --out) OUT=${2:-} ;;
    --parts) PARTS=${2:-} ;;
    --operators) OPERATORS=${2:-} ;;
    *) echo "gpu_check.sh: unknown argument $1 (see the top of this file)" >&2; exit 2 ;;
  esac
  shift 2 2>/dev/null || { echo "gpu_check.sh: $1 needs a value" >&2; exit 2; }
done
for part in ${PARTS//,/ }; do
  case ,$KNOWN, in
    *",$part,"*) ;;
    *) echo "gpu_check.sh: --parts: no part is called $part (${KNOWN//,/, })" >&2; exit 2 ;;
  esac
done
for operator in ${OPERATORS//,/ }; do
  if [ ! -e "tests/support/branches/$operator.py" ]; then
    echo "gpu_check.sh: --operators: no CUDA operator is called $operator" >&2; exit 2
  fi
done
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
TABLE=$OUT/check.txt

export SOFTDIMO_LIBRARY_DIR=$PWD/build/gpu/lib PYTHONPATH=$PWD PYTHONUNBUFFERED=1
DEVICE=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")')
PYTEST="$PYTHON -m pytest -q -p no:cacheprovider"
CHOSEN=${OPERATORS//,/ or }
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

# sanitize TOOL
sanitize() {
  if [ "$DEVICE" = none ]; then echo "no device"; return 77; fi
  if ! command -v compute-sanitizer >/dev/null; then echo "compute-sanitizer is not on PATH"; return 77; fi
  # Without torch's caching, an overrun leaves its own allocation and is seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # Torch's kernels are not what is asked about; but what they write is what initcheck has to see written.
  local exclude="--kernel-name-exclude kernel_substring=at::"
  if [ "$1" = initcheck ]; then exclude=; fi
  compute-sanitizer --tool "$1" --error-exitcode 9 $exclude \
    $PYTEST -x tests/gpu/test_branches.py -k "agrees${CHOSEN:+ and ($CHOSEN)}" 2>&1 | tee "$OUT/sanitizer.tmp"
  local code=${PIPESTATUS[0]}
  if grep -q -E "Device not supported|Failed to initialize|not permitted" "$OUT/sanitizer.tmp"; then code=77; fi
  rm "$OUT/sanitizer.tmp"
  return "$code"
}

bench() {
  local device=cuda
  if [ "$DEVICE" = none ]; then device=cpu; fi
  # Kept beside the log, and cut off before the part's own limit: finished cases are in the table.
  rm -rf build/gpu-bench
  local chosen=${OPERATORS:+--operator ${OPERATORS//,/ }}
  $PYTHON -m softdimo_fast.benchmark --floors $chosen >"$OUT/floors.md"
  timeout --signal=INT $((LIMIT - 30)) $PYTHON -m softdimo_fast.benchmark --device "$device" --out build/gpu-bench \
    $chosen ${BENCH_ARGS:-}
  local code=$?
  find build/gpu-bench -maxdepth 1 -name '*.csv' -exec cp {} "$OUT/results.csv" \;
  find build/gpu-bench -maxdepth 1 \( -name '*.md' -o -name '*.html' \) -exec cp {} "$OUT/" \;
  return $code
}

export -f build sanitize bench
export OUT LIMIT PYTHON PYTEST DEVICE OPERATORS CHOSEN
{
  echo "device     $DEVICE"
  echo "driver     $(nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem --format=csv,noheader 2>/dev/null || echo none)"
  $PYTHON -c 'import sys, torch; print("versions   Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)'
  echo "nvcc       $(nvcc --version 2>/dev/null | tail -1 || echo none)"
  echo "commit     $(git describe --always --dirty 2>/dev/null || echo unknown)"
} | tee "$TABLE"
for part in ${PARTS//,/ }; do
  case $part in
    build | bench) run "$part" bash -c "$part" ;;
    test) run test $PYTEST tests/gpu tests/ops -m gpu -k "not repeats${CHOSEN:+ and ($CHOSEN)}" ;;
    operators) run operators env OMP_NUM_THREADS=1 $PYTEST $WORKERS tests/ops -m "not gpu" -k "${CHOSEN}" ;;
    races) run races env SOFTDIMO_RACE_SECONDS=$((LIMIT - 60)) $PYTEST tests/gpu/test_branches.py \
      -k "repeats${CHOSEN:+ and ($CHOSEN)}" ;;
    *) run "$part" bash -c "sanitize $part" ;;
  esac
done
! grep -q -E '^[a-z]+ +(failed|timeout)' "$TABLE"
