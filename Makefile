# Two commands for users of this repository: `make demo` and `make test`. Both install what they need under the cache below.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

export FINETUNE_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
PYTHON ?= python3
# One virtual environment for each set of dependencies: other edits of pyproject.toml keep it.
VENV_KEY := $(shell $(PYTHON) -c "import hashlib, json, tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); print(hashlib.sha256(json.dumps([p['project']['dependencies'], p['project']['optional-dependencies'], p['dependency-groups']]).encode()).hexdigest()[:12])")
VENV := $(FINETUNE_CACHE)/venv-$(VENV_KEY)
# Behind all else, the pip that made the environment: uv makes environments without one.
# And Go where its installer puts it, for a shell that was not told.
export PATH := $(VENV)/bin:$(PATH):$(FINETUNE_CACHE)/uv/bin:/usr/local/go/bin
export PYTHONPATH := crds:operator:trainer:.
# CPU is what every machine has; the tests of the trainer run on it.
export DS_ACCELERATOR := cpu
export OMP_NUM_THREADS := 1

CLUSTER_TESTS := tests/api tests/kubectl tests/chart tests/cluster tests/chaos

.PHONY: help venv demo demo-down test test-fast test-long test-cluster check format generate build docs version bench

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: venv ## A real Kubernetes on this machine, the operator, and a fine-tuning job on two nodes (CONTEXT=… uses a cluster of yours)
	python -m tests.cluster.demo $(if $(CONTEXT),--context $(CONTEXT))

demo-down: venv ## Take down what `make demo` left for you to look at
	python -m tests.cluster down

test: venv check ## Unit tests while the cluster's programs and images are built, then the real cluster, but for what takes long there
	python -m tests.cluster build > $(FINETUNE_CACHE)/build.log 2>&1 & build=$$!; \
	units=0; pytest tests --ignore tests/cluster -m "not cluster and not long" -n 2 --dist loadgroup || units=$$?; \
	echo "waiting for the cluster's programs and images (log: $(FINETUNE_CACHE)/build.log)"; \
	wait $$build || { tail -50 $(FINETUNE_CACHE)/build.log; exit 1; }; \
	exit $$units
	pytest $(CLUSTER_TESTS) -m "cluster and not long"

test-fast: venv ## Only what needs neither cluster nor torchrun
	pytest tests/api tests/operator tests/agent tests/docs tests/gitops tests/release -m "not cluster and not slow" -q

test-long: venv ## Only what takes minutes without the cluster
	FINETUNE_RANDOM=1 pytest tests --ignore tests/cluster -m "long and not cluster"

test-cluster: venv ## Only what runs on the real cluster, all of it
	pytest $(CLUSTER_TESTS) -m cluster

check: venv ## Style, types, import contracts, generated files: before every commit
	ruff format --check --quiet . || { echo "run: make format"; exit 1; }
	ruff check --quiet .
	python release/versions.py --check
	mypy
	lint-imports --no-cache > $(FINETUNE_CACHE)/imports.log || { cat $(FINETUNE_CACHE)/imports.log; exit 1; }
	python -m finetune_api --check
	python charts/readme.py --check

format: venv ## Let ruff format, and mend what it can
	ruff format --quiet . && ruff check --quiet --fix .

generate: venv ## Write the CRD, its copies and its reference page from the types, and the tables of the charts' READMEs from their values
	python -m finetune_api
	python charts/readme.py

build: venv ## Build the cluster's programs and the images, without starting anything
	python -m tests.cluster build

docs: venv ## The pages of docs/ as a site, in site/; a dead link is an error
	mkdocs build

version: venv ## Write the version of pyproject.toml wherever else it stands
	python release/versions.py

bench: venv ## Run the benchmarks; each prints one table
	for benchmark in benchmarks/bench_*.py; do python $$benchmark; done

venv: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "Python 3.11 or newer is missing: apt-get install python3 python3-venv"; exit 1; }
	@if [ ! -f $@ ]; then \
	  mkdir -p $(FINETUNE_CACHE); \
	  exec 9> $(FINETUNE_CACHE)/venv.lock; flock 9; \
	  echo "installing Python packages into $(VENV) (about a minute, once)"; \
	  $(PYTHON) -m venv $(FINETUNE_CACHE)/uv || { echo "venv is missing: apt-get install python3-venv"; exit 1; }; \
	  $(FINETUNE_CACHE)/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9; \
	  $(FINETUNE_CACHE)/uv/bin/uv venv --quiet --clear --python $(PYTHON) $(VENV); \
	  $(FINETUNE_CACHE)/uv/bin/uv pip install --quiet --python $(VENV)/bin/python -r pyproject.toml --all-extras --group test --group check; \
	fi; touch $@
