# make demo: set up .venv, then run the whole job on a CPU.    make test: the same set-up, then the tests.
# PYTHON chooses the interpreter, VENV the environment's folder. pip follows your own configuration (index, cache, proxy).

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
INSTALLED := $(VENV)/.installed

.PHONY: demo test setup

demo: $(INSTALLED)
	$(VENV)/bin/grn-scale demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

setup: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer on PATH; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is no Python 3.11 or newer; name another: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu it is the package python3-venv" >&2; exit 2; }
	"$(PYTHON)" -m venv "$(VENV)"
	"$(VENV)/bin/python" -m pip install -c constraints.txt -e ".[test,demo]"
	@"$(VENV)/bin/python" -c 'import torch; print("torch", torch.__version__, f"(CUDA {torch.version.cuda})" if torch.version.cuda else "(CPU build)")'
	@touch "$(INSTALLED)"
