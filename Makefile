# Every target does the set-up it needs. Commands run on this machine alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 4
DEMO_STEPS ?= 260

# DeepSpeed builds an op on first use with the ninja that lies beside it.
export PATH := $(abspath $(BIN)):$(PATH)
# Beside the interpreter it is built for: environments that share a folder would build it again and again.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-all test-lowest bench-quality bench-quality-quick docs-quality bench-systems gpu gpu-wheels checks \
    format clean

help:
	@echo "make setup     .venv with pinned dependencies and this package"
	@echo "make demo      pretrain a small LLaMA with 4 workers on this machine; leaves runs/demo"
	@echo "make test      the quick tests"
	@echo "make test-all  all tests"
	@echo "make test-lowest  the quick tests with the lowest versions that pyproject.toml allows"
	@echo "make bench-quality   validation loss of dense training and of SDP's options: many hours of one core; it can be stopped and goes on"
	@echo "make checks    format, lint and types"
	@echo "make bench-systems  memory, time and traffic beside DDP, FSDP2 and ZeRO, and sweeps; half an hour on two cores"
	@echo "make gpu       what one GPU can show, in nine minutes; DEVICE=cpu tries it at toy size (docs/gpu.md)"
	@echo "make gpu-wheels  wheels of what a machine with a GPU lacks, in runs/wheels"

setup: $(VENV)/.done

# torch comes first and pinned: DeepSpeed's build looks for an installed torch.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel packaging
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/deepspeed-sdp pretrain demo --gpus $(RANKS) --steps $(DEMO_STEPS) --output_dir runs/demo

test: setup
	$(BIN)/python -m pytest -m 'not slow'

test-all: setup
	$(BIN)/python -m pytest

LOWEST := .venv-lowest

test-lowest: $(LOWEST)/.done
	PATH=$(abspath $(LOWEST)/bin):$$PATH TORCH_EXTENSIONS_DIR=$(abspath $(LOWEST))/torch_extensions \
	    $(LOWEST)/bin/python -m pytest -m 'not slow'

$(LOWEST)/.done: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt torch numpy setuptools wheel packaging
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	touch $@

# Trainings that stand in the file already are not run again.
QUALITY := $(BIN)/python -m benchmarks.quality
QUALITY_RESULTS := benchmarks/results/quality.jsonl

bench-quality: setup
	$(QUALITY).run --output $(QUALITY_RESULTS)
	$(QUALITY).run --output $(QUALITY_RESULTS) --size long --groups main defaults gap --equal flops
	$(QUALITY).run --output $(QUALITY_RESULTS) --size narrow --groups main --equal flops
	$(QUALITY).run --output $(QUALITY_RESULTS) --size deep --groups main --equal flops
	$(QUALITY).run --output $(QUALITY_RESULTS) --size wide --rows dense "forward, neurons, 1/2" --equal flops --seeds 1
	$(QUALITY).tables --results $(QUALITY_RESULTS) --summary benchmarks/results/quality.json
	for size in long narrow deep wide; do $(QUALITY).tables --results $(QUALITY_RESULTS) --size $$size \
	    --summary benchmarks/results/quality_$$size.json || exit 1; done
	$(QUALITY).documents

docs-quality: setup
	$(QUALITY).documents

bench-quality-quick: setup
	$(BIN)/python -m benchmarks.quality.run --quick --output runs/quality/quick.jsonl
	$(BIN)/python -m benchmarks.quality.tables --size smoke --results runs/quality/quick.jsonl

checks: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# N is the number of ranks, so each takes a start. A trial: make bench-systems BENCH_ARGS=--quick RESULTS=... DOCS=...
SYSTEMS := $(BIN)/python benchmarks/systems/launch.py --time_limit 3600
RESULTS ?= benchmarks/results
DOCS ?= docs
# The 134M preset's shape, one worker of eight with its peers faked: memory alone.
LARGER := --fake_peers 8 --precision bf16 --hidden_size 768 --layers 12 --head_size 64 --vocab_size 32000 \
    --sequence 512 --micro_batch 2 --quick --contenders DDP FSDP2 'DeepSpeed ZeRO-1' 'DeepSpeed ZeRO-3' \
    'SDP forward neuron 1/2 ZeRO-1' 'SDP forward neuron 1/2 ZeRO-3' 'SDP forward neuron 1/4 ZeRO-1' \
    'SDP forward block 1/2 ZeRO-1' 'SDP backward neuron 1/2 ZeRO-1'

bench-systems: setup
	$(SYSTEMS) --ranks $(RANKS) benchmarks/systems/run.py --output $(RESULTS)/systems.json $(BENCH_ARGS)
	$(SYSTEMS) --ranks $(RANKS) benchmarks/systems/sweep.py --axes size coverage sequence micro_batch link workers \
	    --output $(RESULTS)/sweep.json $(BENCH_ARGS)
	$(SYSTEMS) --ranks 2 benchmarks/systems/sweep.py --axes workers --output $(RESULTS)/sweep_2.json $(BENCH_ARGS)
	$(SYSTEMS) --ranks 8 benchmarks/systems/sweep.py --axes workers --output $(RESULTS)/sweep_8.json $(BENCH_ARGS)
	$(BIN)/python benchmarks/systems/run.py $(LARGER) --output $(RESULTS)/systems_134m.json
	PYTHONPATH=. $(BIN)/python benchmarks/systems/documents.py --results $(RESULTS) --docs $(DOCS)

# A machine with a GPU has a torch of its own, and perhaps no network: nothing is installed there.
DEVICE ?= cuda
GPU_PYTHON ?= $(if $(wildcard $(VENV)/.done),$(BIN)/python,$(PYTHON))
WHEEL_NAMES ?= deepspeed hjson

gpu: $(if $(filter cpu,$(DEVICE)),setup)
	$(if $(filter cpu,$(DEVICE)),$(BIN)/python,$(GPU_PYTHON)) -m benchmarks.gpu --device $(DEVICE) $(GPU_ARGS)

# Only source packages are built; DeepSpeed's ops are compiled where they are used.
gpu-wheels: setup
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -c constraints.txt \
	    --wheel-dir runs/wheels $(WHEEL_NAMES)

clean:
	rm -rf $(VENV) $(LOWEST) runs build dist *.egg-info
