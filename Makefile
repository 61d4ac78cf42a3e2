# make             set up .venv and run steps 1 to 5 on the shipped data; a step reruns when what it depends on changed
# make patients    the same for patients that training has not seen, in patients/ and beside the results of make; needs
#                  the records (downloads them like make data, or: make patients MITDB_DIR=folder)
# make packed      the same as make without a bootstrap, in packed/: a linear network on 2,048 cosines of the features
# make patients-packed  the same as make packed for unseen patients, in patients/packed/ (after make patients, which it runs)
# make demo        five minutes of record 233 from encryption to a picture, in demo/, by a network that has seen nothing of
#                  it, and what its annotations say (after make patients, which it runs; docs/DEPLOYMENT.md); with
#                  DEMO=patients-packed by the linear network
# make test        set up .venv and run the tests
# make bench       measure the front against other encrypted models (after make)
# make data        rebuild data/ from the MIT-BIH records (downloads 94 MB into data/mitdb when they are not there)
# make constraints write constraints.txt, the versions of everything that requirements*.txt need, anew
# make clean       remove the results, keep .venv and data/

.DELETE_ON_ERROR:
.PHONY: all patients packed patients-packed demo test bench data constraints lint clean

CHECK := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c '$(CHECK)' 2>/dev/null && echo $$p && break; done)
RUN := .venv/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt

# P is the folder, with its slash, of other results than those of make; DATA has the arrays; EXPAND and RATES are options
# of steps 1 and 3; BESIDE is a folder whose results step 5 shows beside those in P.
P :=
DATA := data
PACKED := EXPAND=fourier:2048 RATES=100
OPTIONS := $(if $P,--data-dir $(DATA) --workdir $P)
ARRAYS := $(if $(filter data,$(DATA)),$(wildcard data/*.npy)) $(DATA)/dataset.json
RECORDS := $(if $(MITDB_DIR),--records-dir "$(MITDB_DIR)" --no-download)
DEMO := patients
DEMO_RECORD = "$(shell realpath -m "$(or $(MITDB_DIR),data/mitdb)")/233"
step = $(strip $(RUN) $1 $(OPTIONS) $2)

all: $P.fhe.stamp

patients: all
	$(MAKE) P=patients/ DATA=patients/data BESIDE=. all

packed:
	$(MAKE) P=packed/ $(PACKED) all

patients-packed: patients
	$(MAKE) P=patients/packed/ DATA=patients/data $(PACKED) all

.venv/.ready: requirements.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.10, 3.11 or 3.12 with venv is needed; name one: make PYTHON=python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c '$(CHECK)' || { echo "make: $(PYTHON) is not Python 3.10 to 3.12 with venv; name another: make PYTHON=python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv --clear .venv
	$(INSTALL) --requirement requirements.txt
	@touch $@

.venv/.bench-ready: requirements-bench.txt .venv/.ready
	$(INSTALL) --requirement requirements-bench.txt
	@touch $@

# Each step names what its numbers depend on, and no more: how results look is step 5's alone.
$PMLP_model_0.h5: MLP_model_0.py $(addprefix fhe_mlp/,scaling.py dataset.py ecg/evaluation.py networks/mlp.py \
		networks/fitting.py) $(ARRAYS) | .venv/.ready
	$(call step,MLP_model_0.py,$(if $(EXPAND),--expand $(EXPAND)))

$Ptf_pruned_model.h5: TF_pruning.py $PMLP_model_0.h5 | .venv/.ready
	$(call step,TF_pruning.py)

$Pdynamic_pruning_results.xlsx: dynamic_pruning_eval.py fhe_mlp/networks/pruning.py \
		$(wildcard fhe_mlp/quantized/*.py) fhe_mlp/quantized/pbs_complexity.csv $Ptf_pruned_model.h5 | .venv/.ready
	$(call step,dynamic_pruning_eval.py,$(if $(RATES),--rates $(RATES)))

# The files of steps 4 and 5 have names that follow the results, and step 5's must survive an interrupt: stamps.
$P.onnx.stamp: h5_onnx_converter.py $Pdynamic_pruning_results.xlsx | .venv/.ready
	$(call step,h5_onnx_converter.py)
	@touch $@

# What is finished is in its database: with nothing missing it only writes the workbooks and pictures anew.
$P.fhe.stamp: fhe_experiments.py fhe_mlp/workers.py $(wildcard fhe_mlp/encrypted/*.py fhe_mlp/experiments/*.py) \
		fhe_mlp/experiments/columns.csv $P.onnx.stamp | .venv/.ready
	$(call step,fhe_experiments.py,$(if $(BESIDE),--beside $(BESIDE)))
	@touch $@

patients/data/dataset.json: preprocess_mitbih.py $(addprefix fhe_mlp/,scaling.py dataset.py ecg/records.py ecg/beats.py \
		ecg/features.py) | .venv/.ready
	$(RUN) preprocess_mitbih.py --abnormal S V F --split inter-patient --data-dir patients/data $(RECORDS)

# Each side runs in its own folder, as it would on its own machine.
demo: $(DEMO)
	rm -rf demo
	$(RUN) fhe_experiments.py --data-dir patients/data --workdir $(subst -,/,$(DEMO)) --export demo
	cd demo/client && ../../$(RUN) client.py keys && ../../$(RUN) client.py encrypt $(DEMO_RECORD) --minutes 5
	mv demo/client/evaluation_keys.zip demo/client/encrypted_beats.zip demo/server
	cd demo/server && ../../$(RUN) server.py encrypted_beats.zip evaluation_keys.zip
	mv demo/server/encrypted_answers.zip demo/client
	cd demo/client && ../../$(RUN) client.py decrypt encrypted_answers.zip
	$(RUN) benchmarks/compare.py $(DEMO_RECORD) demo/client/233 --minutes 5

bench: .fhe.stamp .venv/.bench-ready
	$(RUN) benchmarks/bench.py

data: .venv/.ready
	$(RUN) preprocess_mitbih.py $(RECORDS)

test: .venv/.ready
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Versions that are in the file already stay; delete it first to take the newest.
constraints: .venv/.ready
	$(RUN) -m pip install --disable-pip-version-check uv
	.venv/bin/uv pip compile --universal --python-version 3.10 --no-header --no-annotate --quiet \
		requirements.txt requirements-bench.txt --output-file constraints.txt

clean:
	rm -rf quantized patients packed demo
	rm -f MLP_model_0.h5 MLP_model_0_* tf_pruned_model* $(filter-out %.py,$(wildcard dynamic_pruning_*)) pruned_model_top_* \
		fhe_results.sqlite results_batch_*.xlsx fhe_summary.xlsx fhe_*.png fhe_steps.csv .onnx.stamp .fhe.stamp
