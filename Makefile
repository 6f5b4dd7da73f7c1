# make sweep   sets up .venv and runs the shape sweep: the quick suite, or the headline suite on a GPU
# make test    sets up .venv and runs the tests
# With PYTHON=python3 both use that environment as it is: nothing is installed and no network is needed.

ifdef PYTHON
  READY :=
  RUN := PYTHONPATH=. $(PYTHON)
  JOBS := $(shell PYTHONPATH=. $(PYTHON) -c "import xdist; print('-n auto --maxprocesses 8')" 2>/dev/null)
else
  VENV := .venv
  READY := $(VENV)/ready
  RUN := $(VENV)/bin/python
  JOBS := -n auto --maxprocesses 8
endif
BASE_PYTHON ?= python3
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
SUITE := $(if $(GPU),headline,quick)

.PHONY: sweep test clean

sweep: $(READY)
	$(RUN) -m jax_router sweep --suite $(SUITE)

test: $(READY)
	$(RUN) -m pytest $(JOBS)

# torch has a CPU build for Python 3.11 only; elsewhere the tests that need it say that they were skipped.
.venv/ready: pyproject.toml constraints.txt
	$(BASE_PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'jax_router needs Python 3.11 or newer; set BASE_PYTHON')"
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	if .venv/bin/python -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))"; then \
	  .venv/bin/python -m pip install --quiet --constraint constraints.txt torch; \
	else echo "torch has no CPU build for this Python: the tests that need it are skipped"; fi
	$(if $(GPU),.venv/bin/python -m pip install --quiet --constraint constraints.txt "jax[cuda13]" --editable ".[cuda]")
	touch $@

clean:
	rm -rf .venv sweep-results
