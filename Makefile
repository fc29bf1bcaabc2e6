# Each virtual environment is made once and again when the files that define it change.
PYTHON ?= python3
VENV := .venv
VENV_OLDEST := .venv-oldest
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: encode test lint check test-oldest clean

# The main job: encode the sample page, and draw it beside its features.
encode: $(VENV)/.installed
	$(VENV)/bin/python scripts/encode.py samples/page.png --output out/page.safetensors --plot out/page.png

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# What CI runs.
check: lint test

# The oldest supported versions; torch of that age comes with CUDA libraries, several GB.
test-oldest: $(VENV_OLDEST)/.installed
	$(VENV_OLDEST)/bin/python -m pytest

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --editable ".[test,dev]"
	touch $@

$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python $(INSTALL) --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV_OLDEST) out
