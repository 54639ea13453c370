# make test    the tests
# make demo    trains a tiny model with GSPO on this machine's CPU: SEED=1 for another one
# make lint    ruff
# The environment is made in .venv on first use, with the versions in .ci/constraints.txt.

PYTHON ?= python3
SEED ?= 0
VENV := .venv
# Spinning threads of two processes on shared cores cost far more than a second thread gains.
export OMP_NUM_THREADS ?= 1

.PHONY: test demo lint clean

$(VENV)/.done: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint .ci/constraints.txt --editable '.[test]'
	touch $@

test: $(VENV)/.done
	$(VENV)/bin/python -m pytest

demo: $(VENV)/.done
	$(VENV)/bin/python scripts/demo.py prepare --seed $(SEED)
	$(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		scripts/train.py --config configs/tiny.yaml --seed $(SEED)
	$(VENV)/bin/python scripts/demo.py report

lint: $(VENV)/.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) outputs
