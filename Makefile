# Everything here makes its own virtual environment first. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: search test parity slow lint benchmarks clean

search: $(VENV)/.core
	$(BIN)/python -m puzzle_jax.search

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow

parity: $(VENV)/.parity
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m parity

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

# One stamp for each set of extras; it is made again when the requirements change.
$(VENV)/.core: pyproject.toml | $(VENV)/.venv
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test $(VENV)/.parity $(VENV)/.lint: $(VENV)/.%: pyproject.toml | $(VENV)/.venv
	$(BIN)/python -m pip install -q -e '.[test$(if $(filter parity,$*),$(comma)parity)$(if $(filter lint,$*),$(comma)lint)]'
	touch $@

comma := ,

clean:
	rm -rf $(VENV) .venv-newest runs .cache
