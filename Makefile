PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv-test
OLDEST := .venv-oldest
LLAMAFACTORY := .venv-llamafactory
PYTEST := -m pytest -n 2

.PHONY: demo test test-slow test-matrix test-llamafactory lint format clean

demo: $(DEMO)/.ready
	$(DEMO)/bin/python examples/train_demo.py $(ARGS)

test: $(TEST)/.ready
	$(TEST)/bin/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(TEST)/.ready
	$(TEST)/bin/python $(PYTEST) -m slow $(ARGS)

test-matrix: $(TEST)/.ready $(OLDEST)/.ready $(LLAMAFACTORY)/.ready
	$(OLDEST)/bin/python $(PYTEST) -m "not slow" $(ARGS)
	$(LLAMAFACTORY)/bin/python $(PYTEST) -m "not slow" $(ARGS)
	$(TEST)/bin/python $(PYTEST) -m "not slow" $(ARGS)

test-llamafactory: $(LLAMAFACTORY)/.ready
	$(LLAMAFACTORY)/bin/python $(PYTEST) tests/llamafactory tests/test_llamafactory_config.py tests/test_trl.py $(ARGS)

lint: $(TEST)/.ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

format: $(TEST)/.ready
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

clean:
	rm -rf .venv-demo .venv-test .venv-oldest .venv-llamafactory .pytest_cache .mypy_cache .ruff_cache

$(DEMO)/.ready: requirements/demo.txt pyproject.toml
$(TEST)/.ready: requirements/test.txt requirements/demo.txt pyproject.toml
$(OLDEST)/.ready: requirements/oldest.txt pyproject.toml
$(LLAMAFACTORY)/.ready: requirements/llamafactory.txt requirements/llamafactory.nodeps.txt pyproject.toml

.venv-%/.ready:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/$*.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(addprefix -r ,$(wildcard requirements/$*.nodeps.txt)) --editable .
	touch $@
