# Everything here sets up what it needs in .venv, with uv where it is installed and pip otherwise.
# One stamp file a set of extras: a second `make test` installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LEAN := .venv-lean
BENCH := .venv-bench
GPU := .venv-gpu
PEERS := sentence-transformers opencv-python-headless braceexpand webdataset pandas matplotlib
EVERYTHING := .[cpu,openvino,nvjpeg,tensorrt-rtx,parquet,faiss,ray,milvus,serve,train,export,dev]
UV := $(shell command -v uv 2>/dev/null)
comma := ,
# $(call install,VENV,PACKAGES)
ifdef UV
install = $(UV) pip install --quiet --python $(1)/bin/python -c constraints.txt $(2)
else
install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(2)
endif

.PHONY: demo test test-lean lint types bench bench-gpu clean help
.DEFAULT_GOAL := help

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.full  ## Draw pictures, train, export, index, evaluate, and write demo/results.html.
	PATH="$(CURDIR)/$(BIN):$$PATH" sh benchmarks/demo.sh demo

# A process for each room: TensorRT's builder has crashed beside the libraries that the other rooms load.
test: $(VENV)/.full test-lean  ## Run all tests; the runtime's also from a wheel in a venv without torch.
	$(BIN)/python -m pytest tests/export
	$(BIN)/python -m pytest tests/runtime
	$(BIN)/python -m pytest tests/training
	$(BIN)/python -m pytest tests/benchmarks

test-lean: $(LEAN)/.wheel
	@! $(LEAN)/bin/python -c 'import torch' 2>/dev/null || { echo 'the lean venv has torch'; exit 1; }
	$(LEAN)/bin/python -m pytest tests/runtime

lint: $(VENV)/.full  ## Check style, and that imports go one way.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.full  ## Check types.
	$(BIN)/mypy

# In venvs of their own: peers bring packages that nothing else here needs, and a GPU another onnxruntime.
bench: $(BENCH)/.peers  ## Ask every question of benchmarks/; goes on where it was cut off. QUESTIONS="--quick" for minutes.
	$(BENCH)/bin/python benchmarks/suite.py bench-work $(QUESTIONS)

bench-gpu: $(GPU)/.wheels  ## All that waits for an NVIDIA GPU, in eight minutes. GPU_PEERS="torch open_clip_torch" beside it.
	$(GPU)/bin/python benchmarks/bench_gpu.py bench-gpu-work $(QUESTIONS)

clean:  ## Remove what make has made.
	rm -rf $(VENV) $(LEAN) $(BENCH) $(GPU) bench-work bench-gpu-work build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.full: $(VENV)/bin/python pyproject.toml constraints.txt
	$(call install,$(VENV),-e '$(EVERYTHING)')
	touch $@

# The wheel as a user gets it, in a venv that holds the runtime and pytest and nothing else.
$(LEAN)/.wheel: $(VENV)/.full $(shell find runtime -type f ! -name '*.pyc') pyproject.toml
	rm -rf dist && $(BIN)/python -m build --quiet --outdir dist
	$(PYTHON) -m venv --clear $(LEAN)
	$(call install,$(LEAN),"$$(ls $(CURDIR)/dist/*.whl)[cpu]" pytest hypothesis)
	touch $@

$(BENCH)/.peers: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(BENCH)
	$(call install,$(BENCH),-e '.[cpu$(comma)openvino$(comma)faiss$(comma)ray$(comma)serve$(comma)train$(comma)export]' $(PEERS))
	touch $@

$(GPU)/.wheels: pyproject.toml
	$(PYTHON) -m venv --clear $(GPU)
	$(call install,$(GPU),-e '.[gpu$(comma)nvjpeg]' onnx-ir matplotlib $(GPU_PEERS))
	touch $@
