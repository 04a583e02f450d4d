# One command each; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON      ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,13))' 2>/dev/null && echo $$p && break; done)
VENV        ?= .venv
# An environment keeps the build of torch that it was created with, whatever newer locks say.
ACCELERATOR ?= $(or $(shell sed -n 1p $(VENV)/.torch 2>/dev/null),default)
TORCH_INDEX ?= $(shell sed -n 2p $(VENV)/.torch 2>/dev/null)
EXTRAS      ?=

SPEC   ?= specs/latex.yaml
OUTPUT ?=
ARGS   ?=

# vLLM pins other versions than training.
SERVING := .venv-serving

JOB   := $(VENV)/bin/python -m job
LOCKS := $(filter-out requirements/serving.txt,$(wildcard requirements/*.txt)) requirements/install.sh

# Images: the build tool, where to push, and mirrors for the build (PIP_INDEX_URL, APT_MIRROR).
ENGINE   ?= $(shell for e in docker podman buildah; do command -v $$e >/dev/null && echo $$e && break; done)
REGISTRY ?= localhost
VERSION  := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BASE_IMAGE ?=
IMAGE = $(REGISTRY)/finetune-job:$(VERSION)-$(ACCELERATOR)
# buildah has no `image inspect` with a size.
IMAGE_SIZE = $(if $(findstring buildah,$(ENGINE)),$(ENGINE) images --format '{{.Size}}' $(IMAGE),\
	$(ENGINE) image inspect --format '{{.Size}}' $(IMAGE) | numfmt --to=si --suffix=B)
# An image does not use the index of the environment here unless TORCH_INDEX is given.
IMAGE_TORCH_INDEX = $(if $(filter command environment,$(firstword $(origin TORCH_INDEX))),$(TORCH_INDEX))

# pip's own variable of the environment here, with what it may hold, is not for an image either.
IMAGE_PIP_INDEX = $(if $(filter command,$(firstword $(origin PIP_INDEX_URL))),$(PIP_INDEX_URL))
# Those of the mirrors that hold a user or a password.
IMAGE_SECRETS = $(foreach url,$(IMAGE_TORCH_INDEX) $(IMAGE_PIP_INDEX) $(APT_MIRROR),\
	$(findstring @,$(word 2,$(subst /, ,$(url)))))

# The browser for the report's tests: from npm if possible, else the machine's.
CHROMIUM := $(VENV)/chromium

.PHONY: help run plan validate setup test test-slow setup-serving test-serving test-gpu fuzz bench parity support audit image lint format manifests diagrams reference session lock clean

help: ## List the targets
	@bold= plain=; [ -t 1 ] && [ "$$TERM" != dumb ] && [ -z "$$NO_COLOR" ] && bold='\033[1m' plain='\033[0m'; \
	awk -F':.*## ' "/^[a-z-]+:.*## / { printf \"  $$bold%-14s$$plain %s\\n\", \$$1, \$$2 }" $(MAKEFILE_LIST)

run: $(VENV)/.ready ## Run a job: make run SPEC=specs/latex.yaml [OUTPUT=URI] [ARGS="--set train.max_steps=5"]
	$(JOB) run $(SPEC) $(if $(OUTPUT),--output $(OUTPUT)) $(ARGS)

plan: $(VENV)/.ready ## Show what a run would do: make plan SPEC=...
	$(JOB) plan $(SPEC) $(if $(OUTPUT),--output $(OUTPUT)) $(ARGS)

validate: $(VENV)/.ready ## Check a spec: make validate SPEC=...
	$(JOB) validate $(SPEC) $(ARGS)

setup: ## Install: make setup [ACCELERATOR=cpu|rocm TORCH_INDEX=URL] [EXTRAS="gpu trackers unsloth"]
	@rm -f $(VENV)/.ready $(VENV)/.ready-dev
	@$(MAKE) --no-print-directory $(VENV)/bin/finetune-job

$(VENV)/.ready: $(LOCKS)
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.11 or 3.12 found. Fix: install one, or make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@PYTHON=$(abspath $(VENV))/bin/python ACCELERATOR="$(ACCELERATOR)" TORCH_INDEX="$(TORCH_INDEX)" EXTRAS="$(EXTRAS)" requirements/install.sh
	@printf '%s\n' "$(ACCELERATOR)" "$(TORCH_INDEX)" > $(VENV)/.torch
	@touch $@

# The command `finetune-job` runs this checkout; setuptools, which builds it, is locked.
$(VENV)/bin/finetune-job: $(VENV)/.ready pyproject.toml
	@$(VENV)/bin/python -m pip install -qq --no-index --no-deps --no-build-isolation -e .
	@touch $@

# Tests use the trackers and bitsandbytes too, and compile of them what they import. This file also
# decides what is installed.
$(VENV)/.ready-dev: $(VENV)/bin/finetune-job Makefile
	@$(VENV)/bin/python -m pip install -qq --no-deps --no-compile -r requirements/dev.txt -r requirements/trackers.txt -r requirements/gpu.txt
	@touch $@

# One thread per process: processes that each use every core slow each other down. Their bytecode is
# kept whatever the shell says: they import the same modules hundreds of times.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest

test: $(VENV)/.ready-dev lint ## Set up, lint and run the tests (no GPU, no network)
	$(PYTEST) -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder $(ARGS)

$(CHROMIUM)/.ready: requirements/chromium.py $(VENV)/.ready-dev
	@$(VENV)/bin/python requirements/chromium.py $(CHROMIUM)

test-slow: $(VENV)/.ready-dev $(CHROMIUM)/.ready ## Run the tests that take minutes
	$(PYTEST) -m slow -n auto --maxprocesses=2 --dist loadfile --no-loadscope-reorder $(ARGS)

setup-serving: $(SERVING)/.ready ## Install vLLM for a CPU, in its own environment

$(SERVING)/.ready: requirements/serving.txt $(wildcard tests/serving/plugin/*) | $(VENV)/.ready
	@test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	@$(SERVING)/bin/python -m pip install -qq --upgrade pip
	$(SERVING)/bin/python -m pip install -qq --no-deps -r requirements/serving.txt
	@$(SERVING)/bin/python -m pip install -qq --no-deps --no-build-isolation --force-reinstall ./tests/serving/plugin
	@rm -rf tests/serving/plugin/build tests/serving/plugin/*.egg-info
	@touch $@

test-serving: $(VENV)/.ready-dev $(SERVING)/.ready ## Serve exported models with a real vLLM and compare
	JOB_VLLM_PYTHON=$(abspath $(SERVING))/bin/python $(VENV)/bin/python -m pytest -m serving $(ARGS)

test-gpu: $(VENV)/.ready-dev ## Run the tests that need a GPU
	$(VENV)/bin/python -m pytest -m gpu $(ARGS)

fuzz: $(VENV)/.ready-dev ## Run the property tests on new random examples
	$(VENV)/bin/python -m pytest --hypothesis-profile=explore -m "" $$(grep -rl "from hypothesis" tests --include='test_*.py') $(ARGS)

bench: $(VENV)/.ready ## Measure training on this machine: make bench [ARGS="--model 28b --rows 32"]
	$(VENV)/bin/python -m benchmarks.training $(ARGS)

image: ## Build the image: make image ACCELERATOR=rocm|cuda|cpu [ENGINE=docker|podman|buildah] [REGISTRY=…] [EXTRAS="gpu trackers unsloth"] [PIP_INDEX_URL=…] [APT_MIRROR=…]
	@test -f containers/$(ACCELERATOR).Containerfile || { echo "image: ACCELERATOR must be rocm, cuda or cpu (found $(ACCELERATOR))" >&2; exit 2; }
	@test -n "$(ENGINE)" || { echo "image: no docker, podman or buildah found. Fix: install one, or name one: ENGINE=…" >&2; exit 2; }
	@test -z "$(strip $(IMAGE_SECRETS))" || { echo "image: a mirror's URL holds a user or a password, which logs and the image's history would show. Fix: put it into /etc/pip.conf of a base of your own: BASE_IMAGE=…" >&2; exit 2; }
	$(ENGINE) build $(IMAGE_FLAGS) -f containers/$(ACCELERATOR).Containerfile \
		-t $(IMAGE) \
		--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git describe --always --dirty --abbrev=12) \
		$(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(if $(IMAGE_TORCH_INDEX),--build-arg TORCH_INDEX=$(IMAGE_TORCH_INDEX)) \
		$(if $(IMAGE_PIP_INDEX),--build-arg PIP_INDEX_URL=$(IMAGE_PIP_INDEX)) $(if $(APT_MIRROR),--build-arg APT_MIRROR=$(APT_MIRROR)) \
		$(if $(EXTRAS),--build-arg EXTRAS="$(EXTRAS)") .
	@echo "$(IMAGE): $$($(IMAGE_SIZE)) unpacked"

lint: $(VENV)/.ready-dev ## ruff, mypy and hadolint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --num-workers 2
	$(VENV)/bin/hadolint containers/*.Containerfile

audit: $(VENV)/.ready-dev ## Check the locks: exact pins, licences, known vulnerabilities
	@$(VENV)/bin/python requirements/audit.py || [ $$? = 3 ]  # 3: the service did not answer, which it reports

format: $(VENV)/.ready-dev ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

manifests: $(VENV)/.ready ## Regenerate k8s/
	env -u BUCKET -u MAX_STEPS -u OUTPUT -u AWS_ENDPOINT_URL -u AWS_ENDPOINT_URL_S3 $(JOB) manifest specs/ernie-4.5-vl-28b-latex.yaml --directory k8s --smoke specs/latex.yaml

session: $(VENV)/.ready ## Record the terminal session of the README again: make session [ARGS=1]
	$(VENV)/bin/python -m docs.images.session $(ARGS)

diagrams: $(VENV)/.ready ## Draw the diagrams again, and the Chinese ones with the words of docs/images/zh.json
	$(VENV)/bin/python -m docs.images.diagrams
	$(VENV)/bin/python -m docs.images.translate

parity: $(VENV)/.ready-dev ## Run the tiny job, the tests for GPUs and each way to compute here; compare with committed results
	$(JOB) parity --tests tests/gpu $(ARGS)

support: $(VENV)/.ready ## Write the tables of docs/17-support.md again
	$(VENV)/bin/python -m docs.support

reference: $(VENV)/.ready ## Regenerate docs/16-reference.md from the schema
	$(JOB) reference --format markdown > docs/16-reference.md

lock: $(VENV)/.ready-dev ## Resolve the lock files again from pyproject.toml
	PATH=$(abspath $(VENV))/bin:$$PATH $(VENV)/bin/python requirements/lock.py

clean: ## Remove the environment and caches
	rm -rf $(VENV) $(SERVING) .pytest_cache .mypy_cache .ruff_cache
