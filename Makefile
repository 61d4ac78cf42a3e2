# make             set up .venv and run steps 1 to 5 on the shipped data; a step reruns when what it depends on changed
# make test        set up .venv and run the tests
# make bench       measure the front against default PTQ and other models (after make)
# make data        rebuild data/ from the MIT-BIH records (downloads 94 MB into data/mitdb when they are not there)
# make constraints write constraints.txt, the versions of everything that requirements*.txt need, anew
# make clean       remove the results, keep .venv and data/

.DELETE_ON_ERROR:
.PHONY: all test bench data constraints lint clean

CHECK := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c '$(CHECK)' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt
ARRAYS := $(wildcard data/*.npy) data/dataset.json

all: .fhe.stamp

.venv/.ready: requirements.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.10, 3.11 or 3.12 with venv is needed; name one: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c '$(CHECK)' || { echo "make: $(PYTHON) is not Python 3.10 to 3.12 with venv; name another: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(INSTALL) --requirement requirements.txt
	@touch $@

.venv/.bench-ready: requirements-bench.txt .venv/.ready
	$(INSTALL) --requirement requirements-bench.txt
	@touch $@

# Each step names what its numbers depend on, and no more: how results look is step 5's alone.
MLP_model_0.h5: MLP_model_0.py fhe_mlp/arrays.py fhe_mlp/networks.py $(ARRAYS) | .venv/.ready
	$(RUN) MLP_model_0.py

tf_pruned_model.h5: TF_pruning.py MLP_model_0.h5 | .venv/.ready
	$(RUN) TF_pruning.py

dynamic_pruning_results.xlsx: dynamic_pruning_eval.py fhe_mlp/neuron_removal.py fhe_mlp/quantized.py fhe_mlp/qat.py \
		tf_pruned_model.h5 | .venv/.ready
	$(RUN) dynamic_pruning_eval.py

# The files of steps 4 and 5 have names that follow the results, and step 5's must survive an interrupt: stamps.
.onnx.stamp: h5_onnx_converter.py dynamic_pruning_results.xlsx | .venv/.ready
	$(RUN) h5_onnx_converter.py
	@touch $@

# What is finished is in its database: with nothing missing it only writes the workbooks and pictures anew.
.fhe.stamp: fhe_experiments.py $(addprefix fhe_mlp/,configuration.py circuit.py cluster.py store.py report.py) \
		.onnx.stamp | .venv/.ready
	$(RUN) fhe_experiments.py
	@touch $@

bench: .fhe.stamp .venv/.bench-ready
	$(RUN) tests/benchmark.py

data: .venv/.ready
	$(RUN) preprocess_mitbih.py

test: .venv/.ready
	$(RUN) -m pytest

lint: .venv/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Versions that are in the file already stay; delete it first to take the newest.
constraints: .venv/.ready
	$(RUN) -m pip install --disable-pip-version-check uv
	.venv/bin/uv pip compile --universal --python-version 3.10 --no-header --no-annotate --quiet \
		requirements.txt requirements-bench.txt --output-file constraints.txt

clean:
	rm -rf quantized
	rm -f MLP_model_0.h5 MLP_model_0_* tf_pruned_model* dynamic_pruning_*.png dynamic_pruning_*.xlsx pruned_model_top_* \
		fhe_results.sqlite results_batch_*.xlsx fhe_summary.xlsx fhe_*.png .onnx.stamp .fhe.stamp
