PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard benchmarks configs curation pipelines scripts serve sightline siglip storage tests)
# Two processes, one test file at a time: tests with Ray or a network in them spend much of their time waiting.
TWO_PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install check quick test test-all demo format clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/.installed ## Make .venv with everything in it

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, sys; assert sys.version_info >= (3, 11)' 2>/dev/null || \
		{ echo "Python 3.11 or newer with venv is needed: apt-get install python3-venv, or set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

check: install ## Lint and type-check
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

quick: install ## Run the tests of single modules, in about a minute
	$(BIN)/pytest tests/quick -m core $(TWO_PROCESSES) $(PYTEST_ARGS)

test: install ## Run the core tests, which need no system package, in less than ten minutes
	$(BIN)/pytest -m core $(TWO_PROCESSES) --junitxml=reports/core.xml $(PYTEST_ARGS)

test-all: test ## Run all tests: the core tests, then the others
	$(BIN)/pytest -m "not core and not alone" $(TWO_PROCESSES) --junitxml=reports/others.xml $(PYTEST_ARGS)
	$(BIN)/pytest -m alone --junitxml=reports/alone.xml $(PYTEST_ARGS)

demo: install ## Render a small dataset, tag it, verify it
	$(BIN)/sightline demo

format: install ## Format the code
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean: ## Remove what the other targets made
	rm -rf .venv demo reports build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
