# Set-up, demo, tests and style of ponder_hf; `make help` lists the targets.
#
# The first call of any target installs everything into $(VENV); later calls re-use it until pyproject.toml or
# constraints.txt changes. On Linux, pip by default takes a build of torch with CUDA libraries of several gigabytes.
# For the CPU build, set PIP_EXTRA_INDEX_URL (or PIP_FIND_LINKS, for a folder of wheels) in the environment to the
# index that PyTorch's installation page names for "CPU", before the first call.

# The interpreter that makes the environment: Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
# Test processes; each computes on one thread.
WORKERS ?= 2
# Where `make compat` keeps its environments (0.1 GB each; 5 GB with a torch of its own), and which versions it tries.
COMPAT ?= .compat
VERSIONS ?=
# Where `make upstream` keeps others' tests, whose it runs (transformers, peft), and on which backbones; none: on all.
UPSTREAM ?= .upstream
SUITE ?= transformers
BACKBONES ?=
# Where `make vllm` keeps its environment (4 GB), and further options: make vllm VLLM_ARGS="-m 'not slow'".
VLLM ?= .vllm
VLLM_ARGS ?=
# Where `make docs` builds the documentation.
SITE ?= site
# Further options: make test PYTEST_ARGS="-k gate", make demo DEMO_ARGS="--base FOLDER", make bench BENCH=NAME,
# make gpu GPU_ARGS="--output FOLDER --quick".
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH ?= all
GPU_ARGS ?=
MUTANTS ?=
# Where `make archives` builds the source archive and the wheel, and on which Pythons it tries them.
ARCHIVES ?= dist
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

VENV_PYTHON = $(VENV)/bin/python
STAMP = $(VENV)/.ponder-hf-installed
# For single tests, beside the environment: transformers imports torchao wherever it is installed, and that writes to
# stderr; packages for quantised caches are of no other use here.
TORCHAO = $(VENV)/overlays/torchao
CACHES = $(VENV)/overlays/caches
# Links that lie as the files do once they are installed, for mypy, which cannot follow how `pip install -e` finds them.
INSTALLED = $(VENV)/installed
# A file's tests in one process; files as tests/conftest.py orders them.
PYTEST = -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
# The environment's own interpreter where there is one already, $(PYTHON) otherwise.
INTERPRETER = $(if $(wildcard $(VENV_PYTHON)),$(VENV_PYTHON),$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage style compat upstream vllm gpu bench docs mutants archives clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Make .venv with everything that demo, test, style and bench need

demo: setup ## Train, convert and compare a small pondering model on real text (about five minutes)
	$(VENV)/bin/ponder-hf demo --overwrite $(DEMO_ARGS)

test: setup ## Run the tests in two processes
	OMP_NUM_THREADS=1 $(VENV_PYTHON) $(PYTEST)

coverage: setup ## Run the tests and list the lines of the package that none of them reaches (half as long again as test)
	@rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m coverage run $(PYTEST); \
		passed=$$?; $(VENV_PYTHON) -m coverage combine --quiet && $(VENV_PYTHON) -m coverage report && exit $$passed

style: setup ## Check style and formatting with ruff, types with mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@rm -rf $(INSTALLED) && mkdir -p $(INSTALLED)/ponder_hf
	@ln -s $(CURDIR)/ponder_hf/* $(CURDIR)/modeling $(CURDIR)/conversion $(INSTALLED)/ponder_hf
	MYPYPATH=$(INSTALLED) $(VENV_PYTHON) -m mypy -p ponder_hf

compat: setup ## Try checkpoints under other transformers and torch (15 minutes, 10 GB; VERSIONS="oldest newest": 3, small; or latest)
	PYTHONPATH=tests $(VENV_PYTHON) -m compat --environments $(COMPAT) $(VERSIONS)

upstream: setup ## Run transformers' own model tests on pondering models (10 minutes; SUITE=peft: PEFT's; BACKBONES="llama gpt2": fewer)
	PYTHONPATH=tests $(VENV_PYTHON) -m upstream --folder $(UPSTREAM) --suite $(SUITE) $(BACKBONES)

vllm: ## Test the plug-in for vLLM in an environment of its own (30 minutes, 4 GB; VLLM_ARGS="-m 'not slow'": 8)
	@test -f $(VLLM)/.ponder-hf-installed -a $(VLLM)/.ponder-hf-installed -nt pyproject.toml \
		-a $(VLLM)/.ponder-hf-installed -nt tests/serving/constraints.txt || \
		{ $(INTERPRETER) tests/serving/environment.py $(VLLM) && touch $(VLLM)/.ponder-hf-installed; } || test $$? = 3
	@test ! -f $(VLLM)/.ponder-hf-installed || \
		OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -n $(WORKERS) --dist load tests/test_vllm*.py $(VLLM_ARGS)

gpu: setup ## Check and measure pondering on this machine's GPU (five minutes; GPU_ARGS=--quick: three)
	PYTHONPATH=tests $(VENV_PYTHON) -m gpu $(GPU_ARGS)

bench: setup ## Run the benchmark named by BENCH=NAME, or all of them (hours); `python -m benchmarks` lists them
	$(VENV_PYTHON) -m benchmarks $(BENCH)

docs: setup ## Build the documentation site into site/, links and anchors checked (a minute)
	@$(VENV_PYTHON) -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || \
		$(VENV_PYTHON) -m pip install -c constraints.txt --no-build-isolation -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --clean --site-dir $(abspath $(SITE))

mutants: setup ## Break the code in small ways, one at a time: the tests must notice each (an hour; MUTANTS=PART: only some)
	PYTHONPATH=tests $(VENV_PYTHON) -m mutation --workers $(WORKERS) \
		$(if $(wildcard $(VLLM)/bin/python),--vllm $(abspath $(VLLM)/bin/python)) $(MUTANTS)

archives: setup ## Build the source archive and the wheel, and try both in fresh environments (PYTHONS="python3.10 python3.12")
	PYTHONPATH=tests $(VENV_PYTHON) -m release --output $(ARCHIVES) $(PYTHONS)

clean: ## Remove build outputs, caches, site, .compat, .upstream and .vllm; keep .venv and ponder-demo
	rm -rf build dist site *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .compat .upstream .vllm
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "make: $(INTERPRETER) is not Python 3.10 or newer; name one that is: make PYTHON=... setup" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
		{ echo "make: $(PYTHON) cannot make a virtual environment; install its venv module" >&2; exit 1; }
	$(VENV_PYTHON) -m pip install --quiet -c constraints.txt pip setuptools
	$(VENV_PYTHON) -m pip install -c constraints.txt --no-build-isolation -e '.[all]'
	@$(VENV_PYTHON) -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $(TORCHAO) torchao || \
		echo "make: no torchao: the test of quantised loading will be skipped" >&2
	@$(VENV_PYTHON) -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $(CACHES) \
		hqq optimum-quanto ninja termcolor || \
		echo "make: no hqq and quanto: the tests of their quantised caches will be skipped" >&2
	@touch $@
