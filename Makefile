# Everything here sets up what it needs in .venv, with uv where it is installed and pip otherwise.
# One stamp file a set of extras: a second `make test` installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEAN := .venv-lean
BENCH := .venv-bench
GPU := .venv-gpu
PEERS := sentence-transformers opencv-python-headless braceexpand webdataset pandas matplotlib
EVERYTHING := .[cpu,openvino,nvjpeg,tensorrt-rtx,parquet,faiss,assignment,ray,milvus,serve,train,export,dev]
UV := $(shell command -v uv 2>/dev/null)
comma := ,
# $(call install,VENV,PACKAGES)
ifdef UV
install = $(UV) pip install --quiet --python $(1)/bin/python -c constraints.txt $(2)
else
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(2)
endif

.PHONY: demo quick test test-export test-runtime test-training test-lean test-avx2 lint types docs bench bench-gpu clean help
.DEFAULT_GOAL := help

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## Draw images, train, export, index, evaluate, and write demo/results.html.
	PATH="$(CURDIR)/$(BIN):$$PATH" sh benchmarks/demo.sh demo

# A worker a core, four at most, and in each of them one thread: torch's would take turns on the same cores.
PYTEST = OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: test-lean test-export test-runtime test-training  ## Run all tests; the runtime's also from a wheel without torch.

quick: $(VENV)/.full  ## Run the quick tests, in under a minute.
	$(PYTEST) -m 'not slow and not exhaustive' tests/runtime tests/training/test_config.py tests/training/test_loss.py

# Processes of their own: TensorRT's builder has crashed next to the libraries that the other rooms load.
test-export: $(VENV)/.full
	$(PYTEST) tests/export

test-runtime: $(VENV)/.full
	$(PYTEST) tests/runtime

test-training: $(VENV)/.full
	$(PYTEST) tests/training tests/benchmarks

# What the full venv proves of any way to install it is not proven again.
test-lean: $(LEAN)/.wheel
	@! $(LEAN)/bin/python -c 'import torch' 2>/dev/null || { echo 'the lean venv has torch'; exit 1; }
	$(LEAN)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m 'not exhaustive' tests/runtime

# Each library by its own switch and clipret by CLIPRET_CPU; onnxruntime and OpenVINO have none.
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
test-avx2: export OPENBLAS_CORETYPE = Haswell
test-avx2: export NPY_DISABLE_CPU_FEATURES = X86_V4 AVX512_ICL AVX512_SPR
test-avx2: export FAISS_OPT_LEVEL = AVX2
test-avx2: export CLIPRET_CPU = avx2
test-avx2: test-export test-runtime test-training  ## Run the tests with the kernels of AVX2 processors.

lint: $(VENV)/.full  ## Check style, the direction of imports, and the glossary.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/check_words.py

types: $(VENV)/.full  ## Check types.
	$(BIN)/mypy

# The variable silences mkdocs-material's notice about its successor.
docs: $(VENV)/.docs  ## Build the documentation site in site/, without warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# In venvs of their own: peers bring packages that nothing else here needs, and a GPU another onnxruntime.
bench: $(BENCH)/.peers  ## Ask every question of benchmarks/; goes on where it was cut off. QUESTIONS="--quick" for minutes.
	$(BENCH)/bin/python benchmarks/suite.py bench-work $(QUESTIONS)

bench-gpu: $(GPU)/.wheels  ## All that waits for an NVIDIA GPU, in eight minutes. GPU_PEERS="torch open_clip_torch" next to it.
	$(GPU)/bin/python benchmarks/bench_gpu.py bench-gpu-work $(QUESTIONS)

clean:  ## Remove what make has made.
	rm -rf $(VENV) $(LEAN) $(BENCH) $(GPU) bench-work bench-gpu-work build dist demo site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.full: $(VENV)/bin/python pyproject.toml constraints.txt
	$(call install,$(VENV),-e '$(EVERYTHING)')
	touch $@

# What the demo needs and nothing else; a venv with everything has it already.
$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	test -e $(VENV)/.full || { $(call install,$(VENV),-e '.[cpu$(comma)train$(comma)export]'); }
	touch $@

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(call install,$(VENV),-e '.[docs]')
	touch $@

# The wheel as a user gets it, in a venv that holds the runtime and pytest and nothing else.
$(LEAN)/.wheel: $(VENV)/.full $(shell find runtime -type f ! -name '*.pyc') pyproject.toml
	rm -rf dist && $(BIN)/python -m build --quiet --outdir dist
	$(PYTHON) -m venv --clear $(LEAN)
	$(call install,$(LEAN),"$$(ls $(CURDIR)/dist/*.whl)[cpu]" pytest pytest-xdist hypothesis)
	touch $@

$(BENCH)/.peers: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(BENCH)
	$(call install,$(BENCH),-e '.[cpu$(comma)openvino$(comma)faiss$(comma)ray$(comma)serve$(comma)train$(comma)export]' $(PEERS))
	touch $@

$(GPU)/.wheels: pyproject.toml
	$(PYTHON) -m venv --clear $(GPU)
	$(call install,$(GPU),-e '.[gpu$(comma)nvjpeg]' onnx-ir matplotlib $(GPU_PEERS))
	touch $@
