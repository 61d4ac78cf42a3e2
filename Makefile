# make       set up .venv and run steps 1 to 5 on the shipped data; a stage reruns when its script or input changed
# make test  set up .venv and run the tests
# make bench measure the front against the plain way and other models (after make; about 15 min)
# make data  rebuild data/ from the MIT-BIH records (downloads 94 MB into data/mitdb when they are not there)
# make clean remove the results, keep .venv and data/

.DELETE_ON_ERROR:
.PHONY: all test bench data lint clean

CHECK := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c '$(CHECK)' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
ARRAYS := $(wildcard data/*.npy) data/dataset.json
SHARED := preprocess_mitbih.py fhe_mlp/common.py fhe_mlp/networks.py

all: .fhe.stamp

.venv/.ready: requirements.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.10, 3.11 or 3.12 with venv is needed; name one: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c '$(CHECK)' || { echo "make: $(PYTHON) is no Python 3.10 to 3.12 with venv; give another: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --disable-pip-version-check --requirement requirements.txt
	@touch $@

MLP_model_0.h5: MLP_model_0.py $(SHARED) $(ARRAYS) | .venv/.ready
	$(RUN) MLP_model_0.py

tf_pruned_model.h5: TF_pruning.py MLP_model_0.h5 | .venv/.ready
	$(RUN) TF_pruning.py

dynamic_pruning_results.xlsx: dynamic_pruning_eval.py fhe_mlp/neuron_removal.py fhe_mlp/quantized.py \
		fhe_mlp/quantized_training.py tf_pruned_model.h5 | .venv/.ready
	$(RUN) dynamic_pruning_eval.py

# The files of steps 4 and 5 have names that follow the results, and step 5's must survive an interrupt: stamps.
# They need fhe_mlp/quantized.py too, and step 3, which depends on it, comes before them.
.onnx.stamp: h5_onnx_converter.py dynamic_pruning_results.xlsx | .venv/.ready
	$(RUN) h5_onnx_converter.py
	@touch $@

.fhe.stamp: fhe_experiments.py $(wildcard fhe_mlp/*.py) .onnx.stamp | .venv/.ready
	$(RUN) fhe_experiments.py
	@touch $@

bench: .fhe.stamp
	$(RUN) tests/benchmark.py

data: .venv/.ready
	$(RUN) preprocess_mitbih.py

test: .venv/.ready
	$(RUN) -m pytest

lint: .venv/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf quantized
	rm -f MLP_model_0.h5 MLP_model_0_* tf_pruned_model* dynamic_pruning_*.png dynamic_pruning_*.xlsx pruned_model_top_* \
		results_batch_*.xlsx fhe_summary.xlsx benchmark.xlsx fhe_*.png .lock .onnx.stamp .fhe.stamp
