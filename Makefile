# `make bench`, `make demo` and `make test` set up everything in .venv by themselves: all they need is Python >= 3.10, pip
# and make.
# PYTHON=python3.12 chooses the interpreter, ARGS="..." adds arguments to the command that is run.

PYTHON ?= python3
BIN := .venv/bin

# A bench that was stopped goes on; one of other code or settings starts over. ARGS=--fresh measures everything again.
BENCH := --model shapes-llava --suite shapes --pruners all,random@transprune,random@corematching \
	--keep 0.5,0.25,0.11 --limit 200 --out results.db --fresh=changed --html leaderboard.html

# Its own requirements are those of 2023; its model code runs without most of them.
LLAVA := llava-torch==1.2.2.post1

PARALLEL := -n auto --maxprocesses 8 --dist worksteal

# Where the operating system leaves ensurepip out of Python (Debian), the pip at hand puts one into the environment.
new-venv = $(PYTHON) -m venv --clear $(1) || { $(PYTHON) -m venv --clear --without-pip $(1) && \
	$(PYTHON) -m pip --python $(1)/bin/python install pip; }

.DELETE_ON_ERROR:
.PHONY: bench demo test test-all test-oldest test-lmms vllm-env test-vllm test-llava check-releases lint style types \
	format clean

bench: .venv/core.stamp
	$(BIN)/foveate bench $(BENCH) $(ARGS)

demo: .venv/demo.stamp
	$(BIN)/foveate demo $(ARGS)

# Without the cases that tests/slow.py calls slow.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

# Everything, as CI runs it.
test-all: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# The tests of test-all on the lowest supported versions, in an environment of their own (.venv-oldest, 6 GB).
test-oldest: .venv-oldest/stamp
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(PARALLEL) $(ARGS)

# What lmms-eval and vLLM themselves use of what is deprecated is theirs: no warning is an error in the two.

# The plug-in for lmms-eval, in an environment of its own (.venv-lmms, 6 GB): lmms-eval brings some 150 packages along.
test-lmms: .venv-lmms/stamp
	OMP_NUM_THREADS=1 .venv-lmms/bin/python -m pytest tests/lmms -o filterwarnings=default $(ARGS)

# The plug-in for vLLM, in an environment of its own (.venv-vllm, 4 GB): vLLM pins another torch and another transformers.
vllm-env: .venv-vllm/stamp

test-vllm: .venv-vllm/stamp
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/vllm -o filterwarnings=default $(ARGS)

# Models of the original LLaVA package under the transformers it was written for, in .venv-llava (1.2 GB).
test-llava: .venv-llava/stamp
	OMP_NUM_THREADS=1 .venv-llava/bin/python -m pytest -n 2 tests/adapters/families/test_llava_original.py $(ARGS)

# Is a newer release of a dependency out than the tests were run with (foveate/tested.py)? Nothing is installed for it.
check-releases:
	$(PYTHON) -m tests.check_releases

lint: style types

style: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# In the environment of the tests: pyright reads the types of torch and the rest.
types: .venv/dev.stamp
	$(BIN)/python -m tests.check_types

format: .venv/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-lmms .venv-vllm .venv-llava build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# Stamps: nothing is installed twice unless the project's own requirements changed. `dev` covers the other three.

.venv/core.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

.venv/demo.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[demo]'
	@touch .venv/core.stamp $@

.venv/dev.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps $(LLAVA)
	@touch .venv/core.stamp .venv/demo.stamp .venv/lint.stamp $@

# ruff and pyright at the versions that setup.cfg names, without torch and the rest
.venv/lint.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -c "import configparser as c; p = c.ConfigParser(); p.read('setup.cfg'); \
	print(p['options.extras_require']['lint'])" > .venv/lint.txt
	$(BIN)/python -m pip install --requirement .venv/lint.txt
	@touch $@

.venv-oldest/stamp: setup.cfg pyproject.toml tests/oldest-requirements.txt
	$(call new-venv,.venv-oldest)
	.venv-oldest/bin/python -m pip install --requirement tests/oldest-requirements.txt \
	--editable '.[cuda12,demo,llava,video,vit]'
	.venv-oldest/bin/python -m pip install --no-deps $(LLAVA)
	@touch $@

.venv-lmms/stamp: setup.cfg pyproject.toml tests/lmms/constraints.txt
	$(call new-venv,.venv-lmms)
	.venv-lmms/bin/python -m pip install --constraint tests/lmms/constraints.txt --editable '.[eval]' \
	torchvision accelerate datasets pytest pytest-timeout
	@touch $@

.venv-vllm/stamp: setup.cfg pyproject.toml tests/vllm/requirements.txt tests/vllm/prepare_env.py
	$(call new-venv,.venv-vllm)
	.venv-vllm/bin/python -m pip install --requirement tests/vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --no-deps --editable .
	.venv-vllm/bin/python tests/vllm/prepare_env.py
	@touch $@

# Everything that foveate itself needs, as setup.cfg has it, but for transformers
.venv-llava/stamp: setup.cfg tests/adapters/families/llava-requirements.txt
	$(call new-venv,.venv-llava)
	.venv-llava/bin/python -c "import configparser as c; p = c.ConfigParser(); p.read('setup.cfg'); \
	needs = p['options']['install_requires'].split('\n'); \
	print(*(n for n in needs if not n.startswith('transformers')), sep='\n')" > .venv-llava/core.txt
	.venv-llava/bin/python -m pip install --requirement tests/adapters/families/llava-requirements.txt --requirement .venv-llava/core.txt
	.venv-llava/bin/python -m pip install --no-deps $(LLAVA)
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c "import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and \
	f'foveate needs Python >= 3.10; $(PYTHON) is {v}: make PYTHON=python3.12 ...')"
	$(call new-venv,.venv)
