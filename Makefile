# Each virtual environment is made once and again when the files that define it change.
PYTHON ?= python3
VENV := .venv
VENV_OLDEST := .venv-oldest
VENV_NEWEST := .venv-newest
VENV_TORCHVISION := .venv-torchvision
NODE := .node
TRANSFORMERS_JS := @huggingface/transformers@4.3.1
# Everything but torchvision, whose registry builds for Linux want CUDA libraries, and torchao: transformers imports it
# wherever it is installed, and it writes warnings to every program's stderr. Its tests find it in a folder of its own.
EXTRAS := test,dev,plot,export,finetune,corpora,search,dist
# What installing compiles.
KERNEL := hatch_build.py image_encoder_vit/cpu_kernel.c image_encoder_vit/cpu_vectors.h
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: encode test benchmark lint check dist test-oldest test-newest test-torchvision test-js test-browser clean

# The main job: encode the sample page, and draw it beside its features.
encode: $(VENV)/.installed
	$(VENV)/bin/python scripts/encode.py samples/page.png --output out/page.safetensors --plot out/page.png --overwrite

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

# The encoder beside transformers' own, at 1024 x 1024 px; under five minutes on 2 cores.
benchmark: $(VENV)/.installed
	$(VENV)/bin/python scripts/benchmark.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# What CI runs.
check: lint test

# What is published, each tried in an empty environment.
dist: $(VENV)/.installed
	$(VENV)/bin/python scripts/build_dist.py dist

# The oldest supported versions.
test-oldest: $(VENV_OLDEST)/.installed
	$(VENV_OLDEST)/bin/python -m pytest

# The newest releases of everything, beside the CPU build of torch.
test-newest: $(VENV_NEWEST)/.installed
	$(VENV_NEWEST)/bin/python -m pytest

# The image processors with torchvision, whose registry builds come with CUDA libraries too; they run on the CPU.
test-torchvision: $(VENV_TORCHVISION)/.installed
	$(VENV_TORCHVISION)/bin/python -m pytest tests/test_image_processing.py tests/test_image_processing_torchvision.py \
		tests/test_views.py tests/test_tiled_features.py tests/test_loading.py tests/test_remote_code.py

# What `export --format transformers.js` writes, in Node; transformers.js brings binaries for several systems, 0.5 GB.
test-js: $(VENV)/.installed $(NODE)/.installed
	$(VENV)/bin/python -m pytest tests/test_transformers_js.py

# The page to click on, in a headless Chromium; from Debian's packages where there is none.
test-browser: $(VENV)/.installed
	which chromium chromedriver || (apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver)
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt selenium
	$(VENV)/bin/python -m pytest tests/test_explorer.py

$(VENV)/.installed: pyproject.toml constraints.txt $(KERNEL)
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --editable ".[$(EXTRAS)]"
	$(VENV)/bin/python $(INSTALL) --constraint constraints.txt --no-deps --target $(VENV)/torchao torchao
	$(VENV)/bin/python tests/transformers_suites.py
	touch $@

$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt $(KERNEL)
	$(PYTHON) -m venv --clear $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python $(INSTALL) --constraint constraints-oldest.txt --editable ".[$(EXTRAS)]"
	touch $@

$(VENV_NEWEST)/.installed: pyproject.toml constraints-newest.txt $(KERNEL)
	$(PYTHON) -m venv --clear $(VENV_NEWEST)
	$(VENV_NEWEST)/bin/python $(INSTALL) --constraint constraints-newest.txt --editable ".[$(EXTRAS)]"
	touch $@

$(VENV_TORCHVISION)/.installed: pyproject.toml constraints-torchvision.txt $(KERNEL)
	$(PYTHON) -m venv --clear $(VENV_TORCHVISION)
	$(VENV_TORCHVISION)/bin/python $(INSTALL) --constraint constraints-torchvision.txt --editable ".[test,torchvision]"
	touch $@

# Without install scripts, which would download what a CPU does not need.
$(NODE)/.installed:
	mkdir -p $(NODE)
	npm install --prefix $(NODE) --no-save --no-package-lock --no-audit --no-fund --ignore-scripts $(TRANSFORMERS_JS)
	touch $@

clean:
	rm -rf $(NODE) $(VENV) $(VENV_OLDEST) $(VENV_NEWEST) $(VENV_TORCHVISION) .suites_cache dist out
