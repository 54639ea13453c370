# make test    the tests
# make test-exhaustive    the long ones, of which `make test` runs a part
# make demo    trains a tiny model with GSPO on this machine's CPU: SEED=1 for another one
# make validate    checks the installation, and writes outputs/validate/validate.md; a few minutes
# make evidence    GSPO against GRPO over five seeds, and docs/evidence.md with its figure; most of an hour
# make lint    ruff
# make quality    ruff, and a look at the advisories for the installed packages; AUDIT=required fails without network
# make test-oldest-trl    the tests that compare with TRL, on the oldest TRL of the supported range
# The environment is made in .venv on first use, with the versions in .ci/constraints.txt.

PYTHON ?= python3
SEED ?= 0
VENV := .venv
# Spinning threads of two processes on shared cores cost far more than a second thread gains.
export OMP_NUM_THREADS ?= 1

OLDEST_TRL := 1.14.2

.PHONY: test test-exhaustive test-oldest-trl demo validate evidence lint audit quality clean

$(VENV)/.done: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint .ci/constraints.txt --editable '.[test]'
	touch $@

test: $(VENV)/.done
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not timing and not exhaustive"
	$(VENV)/bin/python -m pytest -m "timing and not exhaustive"

# pytest ends with 5 where no test is marked with both.
test-exhaustive: $(VENV)/.done
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "exhaustive and not timing"
	$(VENV)/bin/python -m pytest -m "exhaustive and timing" || test $$? -eq 5
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --hypothesis-profile exhaustive --durations 0 tests/test_properties_*.py

# A copy of that TRL before the installed one on the path: the rest of the environment stays.
test-oldest-trl: $(VENV)/.done
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $(VENV)/oldest-trl trl==$(OLDEST_TRL)
	PYTHONPATH=$(VENV)/oldest-trl $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not exhaustive" tests/test_host.py tests/test_config.py tests/test_trainer.py tests/test_trainer_credit.py tests/test_trainer_rollout.py

demo: $(VENV)/.done
	$(VENV)/bin/python scripts/demo.py prepare --seed $(SEED)
	$(VENV)/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		scripts/train.py --config configs/tiny.yaml --seed $(SEED)
	$(VENV)/bin/python scripts/demo.py report

validate: $(VENV)/.done
	$(VENV)/bin/python scripts/validate.py

evidence: $(VENV)/.done
	$(VENV)/bin/python scripts/compare.py all --docs docs/evidence.md

lint: $(VENV)/.done
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

audit: $(VENV)/.done
	$(VENV)/bin/python .ci/audit.py

quality: lint audit

clean:
	rm -rf $(VENV) outputs
