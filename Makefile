# Everything a newcomer needs: `make demo`, then `make test`. Python 3.11+, pip and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench clean

# Installed anew whenever what is to be installed changes.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[test]
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .[bench,eval]
	touch $@

# Peers that benchmarks run beside us and that need other versions of what we need.
.venv-peers/.installed: benchmarks/peers-requirements.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r benchmarks/peers-requirements.txt
	touch $@

demo: $(VENV)/.demo  ## the whole system on this machine, in minutes
	$(BIN)/python -m retro_ray demo

# The playground's tests drive a browser. Without one they are skipped, and say so; so this may fail.
$(VENV)/.browser: | $(VENV)/.test
	command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && { \
		timeout 100 apt-get -qq update; \
		DEBIAN_FRONTEND=noninteractive timeout 200 apt-get -qq install -y --no-install-recommends chromium >/dev/null; \
	}; } || echo "no Chromium: the playground's tests will be skipped"
	touch $@

# Three parts side by side, about as long as each other: whoever starts processes leaves a core idle now and then.
# In the first and the second one, tests that start Ray come first, in a process of their own.
PYTEST := $(BIN)/python -m pytest
WITH_RAY := tests/e2e tests/integration/test_training.py
AFTER_FIRST := tests/properties tests/unit/generation tests/unit/index
AFTER_SECOND := tests/browser tests/unit/evaluation tests/unit/training/test_compiled.py
THIRD := tests $(addprefix --ignore ,tests/e2e tests/integration $(AFTER_FIRST) $(AFTER_SECOND))
test: $(VENV)/.test $(VENV)/.browser
	@{ $(PYTEST) $(WITH_RAY); status=$$?; $(PYTEST) $(AFTER_SECOND) || status=1; exit $$status; } \
		>$(VENV)/tests-second.log 2>&1 & second=$$!; \
	{ $(PYTEST) $(THIRD); } >$(VENV)/tests-third.log 2>&1 & third=$$!; \
	trap "pkill -P $$second,$$third; kill $$second $$third" INT TERM; \
	$(PYTEST) tests/integration $(addprefix --ignore ,$(WITH_RAY)); status=$$?; \
	$(PYTEST) $(AFTER_FIRST) || status=1; \
	wait $$second || status=1; wait $$third || status=1; \
	cat $(VENV)/tests-second.log $(VENV)/tests-third.log; exit $$status

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell retro_ray jobs tests benchmarks cluster *.md
	$(BIN)/basedpyright

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.bench .venv-peers/.installed
	mkdir -p results
	$(BIN)/python -m benchmarks.embedding --json results/embedding.json
	$(BIN)/python -m benchmarks.indexing --json results/indexing.json
	$(BIN)/python -m benchmarks.retrieval --json results/retrieval.json
	$(BIN)/python -m benchmarks.faults --json results/faults.json
	$(BIN)/python -m benchmarks.generation --json results/generation.json
	$(BIN)/python -m benchmarks.harness --json results/harness.json
	$(BIN)/python -m benchmarks.load --json results/load.json
	$(BIN)/python -m benchmarks.training --json results/training.json
	$(BIN)/python -m benchmarks.evaluation --json results/evaluation.json
	$(BIN)/python -m benchmarks.learning --json results/learning.json

clean:
	rm -rf $(VENV) .venv-peers results
