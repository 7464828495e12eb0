# `make demo` and `make test` set up .venv on their own; nothing else is needed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
SEEDS ?= 0 1 2
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: help venv demo test test-fast test-slurm test-sglang lint docs pictures results labels rounds study hacking bench clean

help:            ## show this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,docs]' -c constraints.txt
	touch $@

venv: $(VENV)/.installed  ## create .venv with exact pins

demo: venv       ## the main job: all three stages on this machine, report in runs/demo/report.html
	$(BIN)/spark-nemo pipeline +experiment=toy run.dir=$(RUN)

test: venv lint  ## every test
	$(BIN)/python -m pytest

test-fast: venv  ## the tests without subprocesses and training
	$(BIN)/python -m pytest -m "not slow" -n auto

test-slurm: venv  ## the scripts of slurm/ on a real Slurm of five virtual nodes, installed with apt when missing
	PYTHON=$(BIN)/python $(if $(wildcard .venv-sglang),SPARK_SGLANG_PYTHON=$(CURDIR)/.venv-sglang/bin/python) \
	  tests/slurm/run.sh --durations=10 $(PYTEST_ARGS)

test-sglang: venv  ## tests against real SGLang servers on the CPU, in an environment of their own (.venv-sglang)
	PYTHON=$(PYTHON) tests/sglang_env/build.sh
	SPARK_TEST_SGLANG=1 $(BIN)/python -m pytest tests/real_sglang $(PYTEST_ARGS)

lint: venv       ## format, style, import directions, language
	$(BIN)/ruff format --check spark_nemo tests benchmarks tools slurm
	$(BIN)/ruff check spark_nemo tests benchmarks tools slurm
	$(BIN)/lint-imports
	$(BIN)/python tools/lint_language.py

docs: venv       ## the documentation as a site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

pictures:        ## docs/pictures/*.svg from their sources (needs graphviz)
	for name in stages rl_step; do dot -Tsvg docs/pictures/$$name.dot -o docs/pictures/$$name.svg; done

results: venv    ## the demo over several seeds, writes docs/results.md
	$(BIN)/python tools/results.py --seeds $(SEEDS)

labels: venv     ## label quality of every method over five seeds, a section of docs/results.md
	$(BIN)/python tools/label_quality.py --seeds 0 1 2 3 4

rounds: venv     ## labels and reward models round by round over three seeds, a section of docs/results.md
	$(BIN)/python tools/rounds.py --seeds 0 1 2 --rounds 2

study: venv      ## label methods, kinds of reward model and reward designs over five seeds, a section of docs/results.md
	$(BIN)/python tools/study.py --seeds 0 1 2 3 4

hacking: venv    ## policies against reward models with planted weaknesses, a section of docs/results.md
	$(BIN)/python tools/hacking_simulator.py --seeds 0 1 2

bench: venv      ## ratios against named peers, printed
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/packing.py
	@echo "benchmarks/grpo_step.py needs trl: see its docstring"

clean:           ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .hypothesis .ruff_cache
