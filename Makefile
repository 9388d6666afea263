# Everything below makes its own environment in .venv first (a second time: nothing to do).
# The first Python that vLLM's CPU build has wheels for; only used to make .venv.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done || echo python3)
PY := .venv/bin/python
PORT ?= 8471
export PROMPT
# The packages come without bytecode; it is kept at the first import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: wheel help setup setup-sglang demo demo-emulated model test test-host test-engine test-beside-engine test-engines test-sglang
.PHONY: test-slow test-emulator-full lint types clean

help:
	@echo "make demo        serve SmolLM2-135M with vLLM on FA4, ask it something  (PROMPT=\"...\" PORT=8471)"
	@echo "make demo-emulated  two layers of it with the compiled Blackwell kernels on the emulator, tokens compared"
	@echo "make test        set-up, lint, types and every test that needs no GPU and no patience"
	@echo "make test-sglang SGLang's own attention tests and a whole engine on our backend, in an environment of their own"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-emulator-full  programs, kernels and planted faults on the emulator (long)"
	@echo "make wheel       a wheel with compiled kernels (WHEEL=\"--arch sm_90a --shape 32/8,128\")"
	@echo "make lint types  ruff; mypy"
	@echo "make setup       only the environment; PYTHON=python3.12 chooses the interpreter"

setup:
	@$(PYTHON) scripts/setup_env.py

demo: setup
	@$(PY) -m examples.serve_smollm2 --port $(PORT) $${PROMPT:+--prompt "$$PROMPT"}

demo-emulated: setup
	@$(PY) -m examples.serve_emulated --port $(PORT)

model: setup
	@$(PY) -m examples.smollm2

# What takes one core runs two at a time: output of each comes whole, when it has ended. Tests of the host and the emulator have a process
# a core; after them an engine of vLLM, whose threads are bound to their core, runs beside tests that start none and beside SGLang's.
test: setup
	@$(TWO) lint types setup-sglang
	@$(MAKE) --no-print-directory test-host
	@OMP_NUM_THREADS=1 $(TWO) test-engine test-beside-engine

TWO := $(MAKE) --no-print-directory --jobs 2 --output-sync=target
PYTEST := -m pytest -q
FAST := not slow and not gpu
SLOW := slow and not gpu

# Kernels, host code and the emulator: one test process a core.
test-host: setup
	$(PY) $(PYTEST) -m "$(FAST)" -n $(shell nproc) --dist worksteal --ignore tests/engines --ignore tests/engine_sglang

# Two engines of vLLM at a time would bind their threads to the same cores.
test-engine: setup
	$(PY) $(PYTEST) -m "engine and $(FAST)" tests/engines

# A process each, one behind the other: the core that test-engine leaves.
test-beside-engine: test-sglang
	$(PY) $(PYTEST) -m "$(FAST) and not engine" -n 1 tests/engines

test-engines: setup
	$(PY) $(PYTEST) -m "$(FAST) and not engine" -n $(shell nproc) --dist worksteal tests/engines
	@$(MAKE) --no-print-directory test-engine

# SGLang pins other versions than vLLM: .venv-sglang holds it and sees the packages of .venv behind its own.
setup-sglang: setup
	@$(PY) scripts/setup_sglang.py

test-sglang: setup-sglang
	.venv-sglang/bin/python $(PYTEST) -m "$(FAST)" tests/engine_sglang

test-slow: setup
	$(PY) $(PYTEST) -m "$(SLOW)" -n $(shell nproc) --dist worksteal --ignore tests/engines --ignore tests/engine_sglang
	$(PY) $(PYTEST) -m "$(SLOW)" tests/engines
	$(PY) scripts/setup_sglang.py
	.venv-sglang/bin/python $(PYTEST) -m "$(SLOW)" tests/engine_sglang

# The emulator's whole proof. Other people's kernels need flash-attn-4.
test-emulator-full: setup
	$(PY) -m pytest -q -m "not gpu" tests/emulator tests/emulated
	$(PY) -m tests.emulator.sweep --out build/sweep
	$(PY) -m tests.emulator.sweep --collect build/sweep
	@if $(PY) -c "import flash_attn.cute" 2>/dev/null; then \
		$(PY) -m tests.device.upstream_sm90 compile --folder build/upstream_objects && \
		$(PY) -m tests.emulator.fault_injection --kernel upstream_causal --folder build/upstream_objects --out build; \
	else echo "flash-attn-4 is not installed: its kernel is left out"; fi

wheel: setup
	$(PY) scripts/build_wheel.py $(WHEEL)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	@# mypy looks for packages by folder name; `integration/` is installed as `fa4_integration`.
	@mkdir -p build/typing && ln -sfn ../../integration build/typing/fa4_integration
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
