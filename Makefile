# Everything below makes its own environment in .venv first (a second time: nothing to do).
# The first Python that vLLM's CPU build has wheels for; only used to make .venv.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done || echo python3)
PY := .venv/bin/python
PORT ?= 8471
export PROMPT

.PHONY: wheel help setup demo demo-emulated model test test-host test-engines test-sglang test-slow lint types clean

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

test: lint types test-host test-engines test-sglang

# Kernels, host code and the emulator: one test process a core.
test-host: setup
	$(PY) -m pytest -q -m "not slow and not gpu" -n $(shell nproc) --dist worksteal --ignore tests/engines --ignore tests/engine_sglang

# An engine takes all cores and binds its threads to them, so these run one after the other; what starts none has a process a core.
test-engines: setup
	$(PY) -m pytest -q -m "not slow and not gpu and not engine" -n $(shell nproc) --dist worksteal tests/engines
	$(PY) -m pytest -q -m "engine and not slow and not gpu" tests/engines

# SGLang pins other versions than vLLM: .venv-sglang holds it and sees the packages of .venv behind its own.
test-sglang: setup
	$(PY) scripts/setup_sglang.py
	.venv-sglang/bin/python -m pytest -q -m "not slow and not gpu" tests/engine_sglang

test-slow: setup
	$(PY) -m pytest -q -m "slow and not gpu"
	$(PY) scripts/setup_sglang.py
	.venv-sglang/bin/python -m pytest -q -m "slow and not gpu" tests/engine_sglang

# The emulator's whole proof. Other people's kernels need flash-attn-4.
test-emulator-full: setup
	$(PY) -m pytest -q -m "not gpu" tests/emulator tests/emulated
	$(PY) -m tests.emulator.fault_injection --kernel all --jobs $(shell nproc) --clean-seeds 200 --out build
	@if $(PY) -c "import flash_attn.cute" 2>/dev/null; then \
		$(PY) -m tests.device.upstream_sm90 compile --folder build/upstream_objects && \
		$(PY) -m tests.emulator.fault_injection --kernel upstream_causal --folder build/upstream_objects --clean-seeds 200 --out build; \
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
