# Each target makes .venv and installs what it needs, the first time only.

PYTHON ?= python3# the interpreter that .venv is made with
VENV ?= .venv
WORKSPACE ?= $(or $(HPC_IMAGENET_WORKSPACE),workspace)
ARGS ?=# more arguments of pytest, such as ARGS='-k index'

export PIP_DISABLE_PIP_VERSION_CHECK = 1
BIN = $(VENV)/bin

.PHONY: help install demo lab slurm-demo test soak lint hashes clean

help: ## show this
	@echo 'make TARGET [PYTHON=python3.12] [VENV=FOLDER] [WORKSPACE=FOLDER] [ARGS=...]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST)

install: $(VENV)/.installed-demo ## .venv with all that the demo, jobs and trainings need; where there is internet

demo: $(VENV)/.installed-demo ## archives, a datastore, two trained backbones and a leaderboard: minutes
	$(BIN)/python -m hpc_imagenet.demo workspace=$(WORKSPACE)

lab: $(VENV)/.installed-demo ## a private Slurm cluster on this machine: 4 nodes, for cluster=lab
	slurm/lab/lab up

slurm-demo: $(VENV)/.installed-demo ## the same on a private Slurm cluster, on 2 nodes with 2 tasks each
	slurm/lab/lab up
	slurm/lab/lab login $(abspath $(BIN))/python -m hpc_imagenet.demo workspace=$(WORKSPACE)-slurm \
	    cluster=lab cluster.nodes=2 cluster.tasks_per_node=2; code=$$?; slurm/lab/lab down; exit $$code

test: $(VENV)/.installed-test ## all tests; what cannot run here is skipped, with the reason
	$(BIN)/python -m pytest -ra --numprocesses=5 --no-loadscope-reorder $(ARGS)

soak: $(VENV)/.installed-test ## kill every stage at random moments: ARGS='--kills 1000 --seed 1 --minutes 60'
	$(BIN)/python -m tests.soak.run $(ARGS)

lint: $(VENV)/.installed-lint ## format, ruff and mypy --strict, nothing changed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The extras are what the jobs of every setting need but tracker.
IMAGE_EXTRAS = demo energy notify parquet search session timm
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --constraint constraints.txt \
    --generate-hashes --no-annotate --custom-compile-command 'make hashes'

hashes: $(VENV)/.installed-lint ## container/*.txt: hashes of the packages of the images, after changing constraints.txt
	printf 'hatchling\nsetuptools\n' | $(LOCK) --output-file container/build-requirements.txt -
	$(LOCK) $(IMAGE_EXTRAS:%=--extra %) --output-file container/requirements.txt pyproject.toml

clean: ## remove .venv and caches; the workspace stays
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp for each set of extras: written when its installation is through.
$(VENV)/.installed-%: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(VENV)/.made:
	@.ci/venv '$(PYTHON)' '$(VENV)'
	@touch $@

.PRECIOUS: $(VENV)/.made $(VENV)/.installed-%
