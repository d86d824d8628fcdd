# make install    a virtual environment in .venv with torch and this package, built from this checkout
# make demo       Soft-Di[M]O on real digits, tokenizer to TTEO, in minutes; goes on where it was stopped
# make test       the CPU test suite with its coverage bound (builds what has changed first)
# make lint       ruff and mypy
# make verify     the demo from nothing, and the kernels again: sanitizers, every older instruction set
# make bench      every operator beside what it replaces, timed: report.html in runs/bench; resumes where it was stopped
# make clean      removes what was built, but not .venv
#
# Settings, given as `make test NAME=value`:
#   PYTHON  the interpreter that .venv is made of (python3), 3.11 or later
#   TORCH   the torch to install when there is none in .venv (torch==2.13.0)
#   VENV    the environment; `VENV=` (empty) uses PYTHON as it is: nothing is downloaded or upgraded, and it
#           must already have torch, setuptools >= 77, cmake, ninja and the `dev` packages of pyproject.toml
#   JOBS    processes for compiling and testing (all cores)
#   PYTEST_ARGS  further arguments for pytest
#   DEMO    the demo's folder (runs/demo); DEMO_ARGS are further arguments of `softdimo demo`
#   BENCH   the benchmark's folder (runs/bench); BENCH_ARGS are further arguments of `softdimo bench`

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= dev,demo,report,bench,triton
JOBS ?= $(shell nproc)
PYTEST_ARGS ?=
DEMO ?= runs/demo
DEMO_ARGS ?=
BENCH ?= runs/bench
BENCH_ARGS ?=

export MAX_JOBS := $(JOBS)

ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  ENVIRONMENT :=
  # One stamp for each interpreter: each needs its own editable install.
  BUILT := build/built-$(subst /,_,$(shell command -v $(PYTHON)))
  INSTALL = --no-deps -e .
else
  PY := $(VENV)/bin/python
  ENVIRONMENT := $(VENV)/.softdimo-environment
  BUILT := $(VENV)/.softdimo-built
  INSTALL = -c constraints.txt -e .[$(EXTRAS)] $(SAME_TORCH)
  # cmake, ninja and ruff are those of the environment.
  export PATH := $(abspath $(VENV)/bin):$(PATH)
endif

# A process per core, so a thread per process. Neither plug-in is needed to run the tests.
has = $(shell $(PY) -c "import importlib.util as u; print('yes' if u.find_spec('$(1)') else '')")
workers = $(if $(call has,xdist),-n $(JOBS) --dist loadgroup)
coverage = $(if $(call has,pytest_cov),--cov=softdimo_fast --cov-fail-under=90)
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest $(workers) -q

.PHONY: install demo test bench lint verify verify-demo verify-isa verify-sanitize verify-emulation clean FORCE

install: $(BUILT)

# torch comes first and alone, and is named in every later step: pip would otherwise be free to replace it by the
# newest one where another package's requirements suggest that.
SAME_TORCH = "torch==$$($(PY) -c 'import importlib.metadata as m; print(m.version("torch"))')"
$(ENVIRONMENT): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install "$(TORCH)"
	$(PY) -m pip install -c constraints.txt "setuptools>=77" cmake ninja $(SAME_TORCH)
	touch $@

# What the build reads, by content: files that are copied or checked out may carry any date. The interpreter too: the
# libraries lie in this folder, built for the torch of one environment at a time.
FINGERPRINT := build/fingerprint
$(FINGERPRINT): FORCE
	@mkdir -p build
	@{ echo "$(PY) $(SOFTDIMO_CMAKE_ARGS)"; find csrc cmake CMakeLists.txt setup.py pyproject.toml -type f \
	  | LC_ALL=C sort | xargs sha256sum; } > $@.new
	@cmp -s $@.new $@ || cp $@.new $@

$(BUILT): $(FINGERPRINT) $(ENVIRONMENT)
	$(PY) -m pip install --no-build-isolation $(INSTALL)
	touch $@

test: $(BUILT)
	$(PYTEST) $(coverage) $(PYTEST_ARGS) tests

demo: $(BUILT)
	$(PY) softdimo_command.py demo --out $(DEMO) $(if $(wildcard $(DEMO)/demo.json $(DEMO)/seed_*/demo.json),--resume) $(DEMO_ARGS)

# `softdimo bench` with the machine to itself. The same cases as pytest benchmarks: `pytest benchmarks`.
bench: $(BUILT)
	$(PY) softdimo_command.py bench --out $(BENCH) $(if $(wildcard $(BENCH)/settings.json),--resume) $(BENCH_ARGS)

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

verify: verify-demo verify-isa verify-sanitize verify-emulation

# All of it, from nothing: a bar that is missed is an error.
verify-demo: $(BUILT)
	rm -rf build/demo
	$(PY) softdimo_command.py demo --out build/demo
	$(PY) examples/soft_tokens.py

# The best instruction set of this processor is the one that `make test` ran. Those that differ from the next by
# their bfloat16 products alone run the operators that have products.
PRODUCT_TESTS := tests/ops/test_*soft_embedding*.py tests/ops/test_masked_attention*.py
# Triton's kernels are none of the CPU library's.
CPU_TESTS := tests/ops --ignore=tests/ops/triton
verify-isa: $(BUILT)
	set -e; for isa in $$($(PY) -c "from softdimo_fast.ops import _library as l; \
	    isas = l.compiled_cpu_isas(); print(*isas[isas.index(l.cpu_isa()) + 1:])"); do \
	  case $$isa in *-bf16 | *-v4) tests="$(wildcard $(PRODUCT_TESTS))" ;; *) tests="$(CPU_TESTS)" ;; esac; \
	  echo "SOFTDIMO_CPU_ISA=$$isa"; SOFTDIMO_CPU_ISA=$$isa $(PYTEST) $(PYTEST_ARGS) $$tests; \
	done

# Sanitizers must be in the process from its start; libstdc++ too, or they do not find __cxa_throw to wrap.
SANITIZED := build/sanitize
runtimes = $(shell for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done)
UNDER_SANITIZERS = LD_PRELOAD="$(runtimes)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

# The operators with a CPU library that AddressSanitizer and UndefinedBehaviorSanitizer watch.
verify-sanitize: $(BUILT)
	cmake -S . -B $(SANITIZED) -G Ninja -DSOFTDIMO_CUDA=OFF -DSOFTDIMO_SANITIZE=address,undefined \
	  -DTORCH_ROOT=$$($(PY) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)")
	cmake --build $(SANITIZED) --parallel $(JOBS)
	$(UNDER_SANITIZERS) SOFTDIMO_LIBRARY_DIR=$(abspath $(SANITIZED)/lib) $(PYTEST) $(PYTEST_ARGS) $(CPU_TESTS)

# The CUDA kernels, compiled as C++ for the CPU, watched in the same way.
verify-emulation: $(BUILT)
	$(UNDER_SANITIZERS) SOFTDIMO_EMULATION_SANITIZE=1 $(PYTEST) $(PYTEST_ARGS) tests/emulation

clean:
	rm -rf build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f softdimo_fast/_cpu.so softdimo_fast/_cuda.so $(BUILT)
