# `make demo` and `make test` do everything on a fresh clone. PIP_ARGS passes further arguments to pip, for example an
# index that serves CPU builds of torch.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
OUT ?= out-demo
BIN := $(VENV)/bin
# An eighth of the rows and a quarter of the iterations of preset default: minutes, and a result that is a little worse.
DEMO := --samples-per-step 4 --set activation_iterations=10 --evaluation-samples 16
# The installed layout as a folder of links: mypy and import-linter do not follow the package-dir mapping of pyproject.toml.
TREE := build/lint

.PHONY: demo test lint docs clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed  ## calibrate the embedded reference model in a small way, sample with it, draw its report
	mkdir -p $(OUT)
	$(BIN)/ptq-tdq calibrate --output-dir $(OUT)/cifar10-w4a8 --overwrite $(DEMO)
	$(BIN)/ptq-tdq sample $(OUT)/cifar10-w4a8 --backend integer --output $(OUT)/samples.png
	$(BIN)/ptq-tdq report $(OUT)/cifar10-w4a8 --samples 8 --output-dir $(OUT)/report --overwrite
	@echo "This was a small run ($(DEMO)); without these flags calibrate does all of preset default."
	@echo "Look at $(OUT)/samples.png (full precision beside quantized) and open $(OUT)/report/report.html in a browser."

test: $(VENV)/.installed-dev  ## lint and documentation, then every test that is not marked slow
	$(MAKE) --jobs 2 lint docs
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 40

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TREE) && mkdir -p $(TREE)/ptq_tdq
	ln -s $(CURDIR)/ptq_tdq/* $(CURDIR)/cli $(CURDIR)/calib_data $(TREE)/ptq_tdq/
	MYPYPATH=$(TREE) $(BIN)/mypy --strict -p ptq_tdq
	MYPYPATH=$(TREE) $(BIN)/mypy --strict examples
	MYPYPATH=$(TREE):benchmarks:tests/shared $(BIN)/mypy --strict benchmarks/*.py
	cd $(TREE) && $(abspath $(BIN))/lint-imports --no-cache --config $(CURDIR)/pyproject.toml

docs: $(VENV)/.installed-dev  ## the site of the documentation, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[report]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf build dist *.egg-info
