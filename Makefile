# make lab: everything installed, JupyterLab open on the first notebook.   make test: all checks.   make help: the rest.
# In a clone whose path has spaces this works too: every path below is relative.

SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
LAB_FLAGS ?=
PIP_FLAGS ?=
T ?= notebooks tests

# Stored outputs were made on one thread; in checks, models come from the cache that `make models` fills, from no hub.
export JUPYTER_PREFER_ENV_PATH = 1
test run check bench: export OMP_NUM_THREADS = 1
test run check bench: export MKL_NUM_THREADS = 1
test run check bench: export TOKENIZERS_PARALLELISM = false
test run check bench: export HF_HUB_OFFLINE = 1

.PHONY: help lab test check models chromium run format index bench lock clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## +/ /' | awk '{n = $$1; $$1 = ""; printf "make %-9s%s\n", n, $$0}'

lab: $(READY) models  ## open JupyterLab (localhost, token on) at the first notebook
	@$(PY) -m jupyter lab --ServerApp.root_dir=. --ServerApp.ip=127.0.0.1 \
	  $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(LAB_FLAGS) notebooks/00-start/01-welcome.ipynb

test: $(READY) models chromium  ## every check: ruff, generated pages, unit tests, notebooks, browser (T=tests/unit for a part)
	@$(PY) -m ruff check nbkit tests data conftest.py
	@$(PY) -m nbkit.papers index --check
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=180 $(T)

check: $(READY)  ## all of one paper's checks: make check P=grad-cam
	@$(PY) -m nbkit.papers check $(P)

models: $(READY)  ## fetch the models the notebooks use into the cache, once
	@$(PY) -m nbkit.weights fetch || echo "Not all models are here: notebooks that need one say how to get it."

chromium:  ## find Chromium for the browser test, or install it from Debian's packages when root
	@command -v chromium chromium-browser google-chrome >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && echo "Installing Chromium for the browser test ..." && apt-get -qq update \
	  && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
	  || echo "No Chromium: the browser test is skipped. Install your system's chromium package to run it."

run: $(READY)  ## execute notebooks in place, normalised: make run NB=notebooks/00-start/02-hooks.ipynb
	@$(PY) -m nbkit.notebooks run $(NB)

format: $(READY)  ## lay out the code of notebooks at 100 columns: make format NB=notebooks/00-start/02-hooks.ipynb
	@$(PY) -m nbkit.notebooks format $(NB)

index: $(READY)  ## write the generated pages: CLAIMS.md, notebooks/README.md, pictures, tables of README and data/README
	@$(PY) -m nbkit.papers index

bench: $(READY)  ## import time, notebooks' run times, explorers' p95, rows beside other libraries
	@$(PY) -m tests.benchmarks

lock: $(READY)  ## resolve requirements.lock again (LOCK_FLAGS=--upgrade for newer versions)
	@$(PY) -m uv pip compile --universal --python-version 3.11 --fork-strategy fewest --extra all --no-annotate \
	  --custom-compile-command "make lock   (constraints for pip: pip install -e '.[all]' -c requirements.lock)" \
	  --quiet $(LOCK_FLAGS) pyproject.toml -o requirements.lock
	@sed "s/ ; (platform_machine == 'arm64' and .*'darwin') or sys_platform == 'linux' or sys_platform == 'win32'$$//" \
	  requirements.lock > .venv/lock && mv .venv/lock requirements.lock  # a marker that is always true

clean:  ## remove the environment and what test runs leave
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist tests/browser/out

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nbkit needs Python 3.11 or newer, and $(PYTHON) is " \
	  + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv: apt-get install python3-venv"; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv .venv
	@echo "Installing the kit and what its notebooks need into .venv ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e ".[all]" -c requirements.lock
	@mkdir -p .venv/share/jupyter/lab/settings  # no question about news at the first start
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
	  > .venv/share/jupyter/lab/settings/overrides.json
	@touch $(READY)
