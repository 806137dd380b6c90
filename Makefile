# Two commands matter: `make search` tunes kernels for this machine, `make test` runs the tests. Both set everything up.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DOCS_READY := $(VENV)/docs-ready
TUNED := build/mctune_cpu

PYTEST := $(BIN)/pytest -n $(shell nproc) --maxprocesses 8

TRITONS := 3.6.0 3.9.0
# What compiles for the CPU that it runs on.
COMPILED := tests/kernels tests/emit tests/workers/test_evaluate.py $(addprefix tests/runtime/test_,decode.py state_dtype.py)

# The machine with the GPU, for `make wheelhouse` and `make gpu`: the version of its python, the architecture of its GPU;
# that python itself, the minutes, and which stages (faults verify benchmark search paper report, all of them if none is named).
PYTHON_OF_GPU := 3.12
ARCH_OF_GPU := sm_90
GPU_PYTHON := python3
MINUTES := 9.5
STAGES :=
# What such a machine may lack beside its torch and Triton: all of it is small.
WHEELS := numpy click rich markdown-it-py mdurl pygments libcst pyyaml optuna sqlalchemy alembic mako markupsafe \
	colorlog tqdm packaging typing-extensions pytest pluggy iniconfig hypothesis sortedcontainers \
	einops fla-core==0.6.0

# For `make publish`: which GPUs, how many candidates a study, and what compiles them (auto: a study by each that serves).
TARGETS := a100-80g h100-sxm h200 l4 rtx4090 mi300x t4 v100
TRIALS := 60
BACKEND := auto

.PHONY: search test test-all bench publish pages contact gpu wheelhouse lint types docs wheel wheel-check clean setup

search: $(READY)
	$(BIN)/mctune search --gpu cpu --workload quick

# A worker a core, and one more for what Triton interprets, while which one of the others waits (tests/scheduling.py).
test: $(READY)
	$(PYTEST)

# And what takes long; all that is compiled for a CPU, on one with AVX-512 as if it had none (above, kernels are compiled
# for either by turns); and the oldest and the newest Triton that are supported. The interpreter of 3.6 takes the ends of
# a range from arrays in a way that numpy 2.4 refuses.
test-all: test
	$(PYTEST) -m slow
	! $(BIN)/mctune targets cpu | grep -q x86-64-v4 || MCTUNE_CPU_ARCH=x86-64-v3 $(PYTEST) $(COMPILED)
	for version in $(TRITONS); do \
		$(BIN)/pip install -q --disable-pip-version-check --no-deps --target build/triton-$$version triton==$$version \
			$$(test $$version != 3.6.0 || echo 'numpy<2.4') && \
		PYTHONPATH=build/triton-$$version $(PYTEST) tests/triton || exit 1; done

bench: $(READY)
	for pass in forward training decode deep; do \
		$(BIN)/python benchmarks/$$pass.py --out results/cpu/$$pass.json \
			$(if $(wildcard $(TUNED)/tuned.json),--package $(TUNED)) || exit 1; done

# Tables of GPUs that are not here: the decisive workload, searched by prediction, some 20 to 40 minutes a target on two
# cores. The same command goes on where it ended.
publish: $(READY)
	mkdir -p build/publish
	for target in $(TARGETS); do \
		out=build/publish/mctune_$$(echo $$target | tr - _); \
		$(BIN)/mctune search --gpu $$target --workload decisive --backend $(BACKEND) \
			--trials $(TRIALS) --out $$out && \
		$(BIN)/mctune explain --package $$out --json > $$out.compiled.json && \
		$(BIN)/mctune report $$out $$out.compiled.json --out results || exit 1; done
	$(MAKE) pages

# results/index.html and a page of each target.
pages: $(READY)
	$(BIN)/mctune report --html --out results

# On a machine with an NVIDIA GPU, by its own python3: everything is verified, compared and searched, in build/gpu.
# The same command goes on where it ended.
gpu:
	$(GPU_PYTHON) benchmarks/on_gpu.py --minutes $(MINUTES) $(if $(STAGES),--stages $(STAGES))

# On the same machine, and before: in five minutes whether the kernels are right and how fast they are.
contact:
	$(GPU_PYTHON) benchmarks/contact.py

# For a machine with a GPU and no network: copy the checkout with build/wheelhouse to it.
wheelhouse: $(READY)
	rm -rf build/wheelhouse && mkdir -p build/wheelhouse
	grep -v '^torch\|^triton\|numpy' constraints.txt > build/wheelhouse/constraints.txt
	$(BIN)/pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
		--python-version $(PYTHON_OF_GPU) $(foreach N,17 24 26 27 28 31 34 35,--platform manylinux_2_$(N)_x86_64) \
		--platform manylinux2014_x86_64 -c build/wheelhouse/constraints.txt -d build/wheelhouse $(WHEELS)
	$(BIN)/python benchmarks/contact_tvm.py --arch $(ARCH_OF_GPU) --out build/wheelhouse/cuda

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The pages and the API reference, in build/site/index.html. A warning is an error: a link that leads nowhere, a parameter
# that a docstring forgets or invents.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

wheel: $(READY)
	rm -rf dist
	$(BIN)/pip wheel -q --disable-pip-version-check --no-deps -w dist .

# The wheel, installed away from this tree, searches and leaves a package that imports. The dependencies are this
# environment's, through a .pth, which does not carry its editable mctune along.
wheel-check: wheel
	rm -rf build/elsewhere && mkdir -p build/elsewhere
	$(PYTHON) -m venv build/elsewhere/venv
	build/elsewhere/venv/bin/pip install -q --disable-pip-version-check --no-deps dist/mctune-*.whl
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$(build/elsewhere/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth"
	cd build/elsewhere && venv/bin/mctune search --gpu cpu --problem T=512,H=2,Dk=32,Dv=32 --segment-lengths 64,128 \
		--trials 4 --out mctune_cpu && venv/bin/mctune verify mctune_cpu

setup: $(READY)

# torch first and by its exact version: any other spelling may resolve to a build for another device. flashinfer-bench is
# there for its models, which tests hold datasets to, and without its kernels for GPUs, which it depends on.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-deps flashinfer-bench
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
