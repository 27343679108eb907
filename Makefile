# Two commands on a fresh machine: `make quickstart` and `make test`. Everything else is listed by `make help`.
PYTHON ?= python3
VENV   := .venv
# PY=python3 uses an interpreter that already has the dependencies (a GPU machine, say) and makes no environment.
PY     ?= $(VENV)/bin/python
READY  := $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/.installed)

export PYTHONPATH := triton_kernels:.$(if $(PYTHONPATH),:$(PYTHONPATH))
# Tests run as two processes: one thread each, or they fight for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# T=tests/methods/test_lora.py chooses files, K=dora chooses tests by expression.
SUITE := $(ONE_THREAD) $(PY) -m pytest $(if $(T),,-n 2 --dist worksteal) $(T) $(if $(K),-k "$(K)")

.PHONY: help quickstart test test-all peft-tables invariants test-gpu check fix docs pictures check-site package aot bench-gpu bench-gpu-tables

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[all,dev,docs,examples]"
	touch $@

quickstart: $(READY)  ## Install, then fine-tune a real model three ways on the CPU
	OMP_WAIT_POLICY=passive $(PY) examples/quickstart.py

test: $(READY)  ## The tests without slow sweeps and GPU tests; T=path and K=expression choose some
	$(SUITE) -m "not slow and not gpu"

test-all: $(READY)  ## The slow sweeps too; T and K as for test
	$(SUITE) -m "not gpu"

peft-tables: $(READY)  ## Every configuration in the tests of peft's sdist, there and back: counts and refusals
	mkdir -p build/peft
	$(PY) -m pip download --quiet --no-deps --no-binary :all: -d build/peft peft==0.21.2
	tar xzf build/peft/peft-0.21.2.tar.gz -C build/peft
	PEFT_TESTS=build/peft/peft-0.21.2/tests $(ONE_THREAD) $(PY) -m pytest -q -s tests/hf/test_peft_tables.py

invariants: $(READY)  ## What every method promises, on every kind of model and storage: the count
	$(ONE_THREAD) $(PY) -m pytest -q -n 2 -m "not gpu" tests/methods/test_all_methods_all_models.py tests/test_invariants.py

test-gpu: $(READY)  ## What needs an NVIDIA GPU
	$(PY) -m pytest -m gpu

check: $(READY)  ## ruff, mypy strict on both packages, import directions
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_import_directions.py

fix: $(READY)  ## Rewrite what ruff can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(READY)  ## The pages into site/, warnings as errors
	$(PY) -m mkdocs build --strict --quiet

pictures: $(READY)  ## The site's pictures, light and dark, from committed data
	$(PY) docs/pictures.py

check-site: docs  ## Links, and every page in headless Chromium at two widths (needs playwright, chromium)
	$(PY) docs/check_site.py site

package: $(READY)  ## Wheel and sdist into dist/, installed and tried in a fresh environment
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m pytest -q tests/test_packaging.py

aot: $(READY)  ## Every Triton kernel compiled for nine chips: registers, shared memory, spills
	$(PY) -m lightning_peft_kernels.tools.aot --csv benchmarks/results/aot.csv

# SMOKE=1 runs all of it on tiny shapes, on a CPU too.
bench-gpu: $(READY)  ## GPU tests, check --tune and bench in ten minutes: the one command for a new GPU
	$(PY) benchmarks/gpu/first_day.py $(if $(SMOKE),--smoke)

bench-gpu-tables: $(READY)  ## The long GPU benchmarks; tables go to benchmarks/results
	set -e; for script in kernel_ops small_batch training optimizer experts; do \
	  $(PY) benchmarks/gpu/$$script.py $(if $(SMOKE),--smoke); done
