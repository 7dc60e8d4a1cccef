# Two commands on a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraints constraints.txt
export HF_HUB_OFFLINE ?= 1
TORTURE := $(patsubst %,tests/test_%.py,conservation tarheaders hostile memory storage death)

.PHONY: demo test torture test-flink lint fuzz bench model ablations dist clean

demo: $(VENV)/.ready
	$(BIN)/mmbeam demo

test: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal

# Damaged and hostile input, faults of storage, death, and every generator on a simulated GPU, with the long tests that
# `make test` leaves out.
torture: $(VENV)/.ready-test
	$(BIN)/pytest --numprocesses 2 -m "" $(TORTURE)
	$(BIN)/pytest --numprocesses 2 -m torture $(TORTURE:%=--ignore=%)

# On a real Flink 1.19, downloaded from Maven and PyPI. Needs a JDK; takes 16 minutes.
test-flink: $(VENV)/.ready-test
	$(BIN)/pytest tests/flink

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples

# Damaged tars for a number of seconds. A line that it prints belongs into tests/fuzz_corpus.txt, with the fix.
fuzz: $(VENV)/.ready-test
	$(BIN)/python tests/test_fuzz.py $(or $(FUZZ_SECONDS),60)

bench: $(VENV)/.ready-test
	$(BIN)/python bench/run.py

# Retrain the model that ships with the package. Then compare model/figures.json, and copy the model with its card.
model: $(VENV)/.ready
	$(BIN)/python pipelines/train_shipped.py --output model

ablations: $(VENV)/.ready-test
	$(BIN)/python bench/ablations.py

# uv installs torch's 5 GB in a third of pip's time. Compiling bytecode here makes the first start fast.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(UV) --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(UV) --group test --editable .
	touch $@

# The wheel and the sdist, checked as PyPI checks them.
dist: $(VENV)/.ready-test
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	$(BIN)/uv tool run --quiet twine@7.0.0 check --strict dist/*.whl dist/*.tar.gz

clean:
	rm -rf $(VENV) .cache demo model dist build mmbeam.egg-info
