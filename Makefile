# Two commands: `make demo` and `make test`. Both create .venv and install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all docs bench gpu sanitize ascend lint format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,transformers,bench,triton]'
	DEBIAN_FRONTEND=noninteractive sh tools/chromium.sh $(BIN)/python
	touch $@

demo: $(VENV)/.installed  ## a real compressor on a real text, checked against transformers
	@echo "About half a minute on two cores; first, torch and transformers are imported ..."
	$(BIN)/python tools/demo.py --out build/demo

test: $(VENV)/.installed  ## the whole test suite
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed  ## the same with four times as many examples of each property
	$(BIN)/python -m pytest --hypothesis-profile exhaustive

# Runs every block of code on the pages, then follows every link of the built site.
docs: $(VENV)/.installed  ## the documentation site, in build/site
	PATH="$(abspath $(BIN)):$$PATH" COLUMNS=80 NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	$(BIN)/python tools/check_links.py build/site

bench: $(VENV)/.installed  ## timings beside floors and peers
	mkdir -p build/bench
	$(BIN)/kvcondense bench --json build/bench/cpu.jsonl --plot build/bench/cpu.png

gpu: $(VENV)/.installed  ## what only a GPU can show: the kernels compiled and run, graphs, the chip's cast
	$(BIN)/python -m pytest tests/gpu -n 0 -rs

sanitize: $(VENV)/.installed  ## the same on small cases under compute-sanitizer (CUDA toolkit)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -n 0 -k small
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -n 0 -k small

# triton-ascend installs under the name triton, hence the environment of its own. Needs mlir-19-tools, libmlir-19 and
# clang-19 (Debian); no NPU.
ascend: .venv-ascend/.installed  ## the Triton kernels, lowered for Ascend910B and run on this CPU
	mkdir -p build
	.venv-ascend/bin/python tools/ascend.py --json build/ascend.json

.venv-ascend/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-ascend
	.venv-ascend/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pybind11 triton-ascend==3.2.0
	touch $@

lint: $(VENV)/.installed  ## style, types, and the tree's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV) .venv-ascend
