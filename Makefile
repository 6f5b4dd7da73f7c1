# make sweep   sets up .venv and runs the shape sweep: the quick suite, or the headline suite where JAX has a GPU
# make test    sets up .venv and runs the tests
# With PYTHON=python3 both use that environment as it is: nothing is installed and no network is needed.
# .venv is made of the first Python 3.11 or newer that is found, on a GPU machine rather of 3.12 or newer, which
# jax 0.11 and with it the Pallas kernel need; BASE_PYTHON=/path/to/python names another.

GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')

ifdef PYTHON
  READY :=
  RUN := PYTHONPATH=. $(PYTHON)
  JOBS := $(shell PYTHONPATH=. $(PYTHON) -c "import xdist; print('-n auto --maxprocesses 8')" 2>/dev/null)
else
  READY := .venv/ready
  RUN := .venv/bin/python
  JOBS := -n auto --maxprocesses 8
endif
SUITE = $$($(RUN) -c "import jax; print('headline' if jax.default_backend() == 'gpu' else 'quick')")

# A name on PATH is no promise: python3 may be too old, and pyenv's python3.12 may only say that no version is chosen.
PYTHONS := $(if $(GPU),python3.12 python3.13) python3 python3.11 python3.12 python3.13
RECENT := -c "import sys; sys.exit(sys.version_info < (3, 11))"
BASE_PYTHON ?= $(shell for each in $(PYTHONS); do $$each $(RECENT) 2>/dev/null && echo $$each && break; done)
# Python compiles what is imported when it is: most of these packages never are.
PIP := .venv/bin/python -m pip install --quiet --no-compile --constraint constraints.txt
GPU_PACKAGES := --editable ".[cuda]" "jax[cuda13]" "torch; python_version >= '3.12'"

.PHONY: sweep test clean

sweep: $(READY)
	$(RUN) -m jax_router sweep --suite $(SUITE)

test: $(READY)
	$(RUN) -m pytest $(JOBS)

.venv/ready: pyproject.toml constraints.txt
	@$(or $(BASE_PYTHON),false) $(RECENT) || { \
	  echo "make needs Python 3.11 or newer; tried $(or $(BASE_PYTHON),$(PYTHONS)). Install it or set BASE_PYTHON." >&2; \
	  exit 1; }
	$(BASE_PYTHON) -m venv --clear .venv
	$(PIP) --editable ".[dev]" $(if $(GPU),$(GPU_PACKAGES))
	-$(PIP) "torch; python_version < '3.12'"
	@.venv/bin/python -c "import torch" 2>/dev/null || \
	  echo "PyTorch is not installed: there is no pinned build for this Python. The tests that need it are skipped."
	touch $@

clean:
	rm -rf .venv sweep-results
