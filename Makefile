# Two commands: `make demo` and `make test`. Both create .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test bench lint format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,transformers,bench,triton]'
	touch $@

demo: $(VENV)/.installed  ## a real compressor on a real text, checked against transformers
	$(BIN)/python examples/demo.py --out build/demo

test: $(VENV)/.installed  ## the whole test suite
	$(BIN)/python -m pytest

bench: $(VENV)/.installed  ## timings beside floors and peers
	mkdir -p build/bench
	$(BIN)/kvcondense bench --json build/bench/cpu.jsonl --plot build/bench/cpu.png --markdown

lint: $(VENV)/.installed  ## style, types, and the tree's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV)
