.DEFAULT_GOAL := help
.PHONY: help setup debian-packages demo test test-cluster test-containers test-lengthy test-cuda-build test-unit test-hermetic lint study-smoke bench gpu dashboards docs torture clean

# Where it is set, as in many containers, each of the hundreds of processes that the tests start compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

python := .venv/bin/python
code := $(wildcard dist_train tests benchmarks docker/grafana/dashboard_generator)

help: ## show this list
	@sed -nE 's/^([a-z-]+):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "make %-15s %s\n", $$1, $$2 }'

# A file's tests share what they set up. Files that take minutes come first, so that all of pytest's
# processes end together. There may be more of them than cores: these tests also wait for other programs.
by_file := -n 4 --dist loadfile --no-loadscope-reorder
long_files := tests/torture/ tests/cluster/ tests/ranks/ tests/promises/
slow_tests := $(long_files) $(filter-out $(long_files) tests/unit/,$(dir $(wildcard tests/*/__init__.py)))

# The device that `make bench` measures on is no choice of how Horovod is built.
setup: ## make .venv with everything in it (PYTHON=python3.12, DIST_TRAIN_MPI=system|wheel and DEVICE=cpu|cuda choose)
	@DEVICE=$(if $(filter bench,$(MAKECMDGOALS)),,$(DEVICE)) docker/environment.sh

# Those that some tests need, as root; else it says which tests are left out.
debian-packages:
	@docker/debian_packages.sh

demo: setup ## train on Fashion-MNIST with two ranks, and write a report to open
	@launch/demo.sh

test: setup debian-packages ## every test but the lengthy ones of test-cluster, test-containers and test-cuda-build; as root, installs the Debian packages that some need
	$(python) -m pytest -n auto tests/unit
	$(python) -m pytest $(by_file) -m "not lengthy" $(slow_tests)

test-cluster: setup debian-packages ## every test on a Slurm of several nodes, also those that wait for its clocks
	$(python) -m pytest tests/cluster

test-containers: setup debian-packages ## build the images of docker/Dockerfile, for CPUs and for CUDA, and run them; needs root, 35 GiB and half an hour
	$(python) -m pytest tests/containers

test-lengthy: setup debian-packages ## the tests that take long: every launcher, alerts, faults, elastic ranks, GPU kernels in an interpreter, the wheel; downloads Triton and torch
	$(python) -m pytest -m lengthy tests/ranks tests/promises tests/services tests/torture tests/longer $(addprefix --ignore=tests/longer/test_,cuda_build.py hermetic.py kernels.py)
	@$(python) -c 'import triton' 2> /dev/null || test -d build/triton || $(python) -m pip install --quiet --no-deps --target build/triton triton
	PYTHONPATH="$(CURDIR)/build/triton" TRITON_INTERPRET=1 $(python) -m pytest tests/longer/test_kernels.py

test-cuda-build: setup ## set up against PyPI's torch for CUDA in a folder of its own, without a GPU: 3 GB to download, ten minutes
	$(python) -m pytest tests/longer/test_cuda_build.py

test-unit: setup ## the unit tests alone: a few minutes on two cores
	$(python) -m pytest -n auto tests/unit

test-hermetic: setup ## the unit tests again in a copy of the checkout, after a demo, in a random order, from another folder
	$(python) -m pytest -m lengthy tests/longer/test_hermetic.py

lint: setup ## ruff, mypy, bandit, shellcheck and hadolint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy $(code)
	$(python) -m bandit -q -c pyproject.toml -r dist_train
	PATH="$(CURDIR)/.venv/bin:$$PATH" shellcheck launch/*.sh slurm/*.sh docker/*.sh docker/grafana/*.sh tests/cluster/*.sh benchmarks/peers/*.sh .ci/run
	.venv/bin/hadolint docker/Dockerfile

study-smoke: setup ## a small study from its search to its report: tune, confirm on fresh seeds, measure, compare; a minute or two
	.venv/bin/dist-train sweep studies/search.yaml --jobs 2
	.venv/bin/dist-train sweep studies/search.yaml --best | $(python) -m benchmarks.confirm_study studies/search.yaml --seeds 100 101 -o runs/confirm.yaml
	.venv/bin/dist-train sweep runs/confirm.yaml --jobs 2
	.venv/bin/dist-train sweep runs/confirm.yaml --analyses | PATH="$(CURDIR)/.venv/bin:$$PATH" sh -e
	.venv/bin/dist-train report runs/search-confirm

bench: setup ## the side-by-side performance table (DEVICE=cuda: on a GPU); takes hours, `python -m benchmarks --only GROUP` minutes
	@benchmarks/peers/environment.sh
	$(python) -m benchmarks --device $(or $(DEVICE),cpu) --json results/performance-$(or $(DEVICE),cpu).json

gpu: setup ## on a machine with a GPU: the promises, memory, speed and a profile on one page, runs/gpu.md; nine minutes
	$(python) -m benchmarks.gpu

dashboards: setup ## write Grafana's dashboards and the tables of metrics and settings anew, from the code
	PYTHONPATH=docker/grafana $(python) -m dashboard_generator docker/grafana/dashboards
	$(python) -m benchmarks.metrics_table docs/monitoring.md
	$(python) -m benchmarks.settings_page > docs/settings.md

clean: ## remove what was made here, except runs and the caches outside this folder
	rm -rf .venv .venv-loggers .venv-peers build site dist *.egg-info dist_train/kernels/_cpu.abi3.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

docs: setup ## the documentation as a site, with the reference of the Python API, in site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

torture: setup ## a campaign of 500 faults, and 10,000 broken inputs of each kind (FAULTS, SEED, INPUTS)
	$(python) -m tests.torture --faults $(or $(FAULTS),500) --seed $(or $(SEED),0)
	$(python) -m tests.torture.fuzz --inputs $(or $(INPUTS),10000) --seed $(or $(SEED),0)
