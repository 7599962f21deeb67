# `make serve` and `make test` work on a fresh clone: they make .venv and install the project first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINKS := build/types/onebase
SOURCES := adapters bench kernels serve tests
PYTEST_ARGS ?= -n 2

.PHONY: serve test clients-test gpu-test gpu-bench slow-test fmt lint type bench bench-smoke clean

serve: $(STAMP)
	$(BIN)/onebase demo

test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/pytest $(PYTEST_ARGS)

# Packages of clients do not go together: each set has an environment, on top of .venv, which the server runs on.
CLIENTS := openai1 frameworks lm_eval guidellm
clients-test: $(CLIENTS:%=build/clients/%/.installed)
	set -e; for name in $(CLIENTS); do \
	    build/clients/$$name/bin/python -m pytest -W default --no-header -q tests/clients/$${name%1}; \
	done

build/clients/%/.installed: tests/clients/%.txt $(STAMP)
	$(PYTHON) -m venv --without-pip build/clients/$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > "$$(build/clients/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/onebase.pth"
	build/clients/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

slow-test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/pytest -m slow

gpu-test: $(STAMP)
	TRITON_INTERPRET=0 $(BIN)/pytest -m gpu

# Needs neither the virtual environment nor the HTTP stack: torch, triton, transformers and pytest.
gpu-bench:
	PYTHON=$(PYTHON) bench/gpu.sh

fmt: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix-only --quiet $(SOURCES)

lint: $(STAMP)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

type: $(STAMP) $(LINKS)
	$(BIN)/mypy -p onebase

bench: $(STAMP)
	$(BIN)/onebase bench step

# Five minutes on two cores; `onebase bench compare` takes the files of two commits.
bench-smoke: $(STAMP)
	$(BIN)/onebase bench smoke --out build/bench-smoke.json

# The import name onebase.serve lives in the folder serve/: static checkers follow it through links.
$(LINKS): Makefile
	mkdir -p $@
	for p in adapters bench kernels serve; do ln -sfn $(CURDIR)/$$p $@/$$p; done
	touch $@

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf build dist $(VENV) *.egg-info
