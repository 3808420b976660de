# Each target makes what it needs: on a fresh Debian 12, `apt-get install -y python3-venv make` is all that must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# Threads are the largest single effect on small tests: two workers with one thread each are ten times as fast as two
# workers with a thread for every core.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint bench clean

demo: $(VENV)/.ok
	$(BIN)/python benchmarks/demo.py

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

# mypy does not follow the package map of an editable install, so it judges a copy laid out as the wheel is
lint: $(VENV)/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types && cp -r mmssl build/types/ && cp -r modalities recipes build/types/mmssl/
	cd build/types && $(BIN)/mypy --config-file ../../setup.cfg --cache-dir ../../.mypy_cache -p mmssl

bench: $(VENV)/.ok
	$(BIN)/python benchmarks/step_speed.py
	$(BIN)/python benchmarks/embed_speed.py
	$(BIN)/python benchmarks/fbank_speed.py
	$(BIN)/python benchmarks/mask_speed.py
	$(BIN)/python benchmarks/clone_speed.py
	$(BIN)/python benchmarks/omni_speed.py
	$(BIN)/python benchmarks/units_speed.py
	$(BIN)/python benchmarks/contrast_memory.py
	$(BIN)/python benchmarks/decode_speed.py
	$(BIN)/python benchmarks/pipeline_speed.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/files_speed.py

$(VENV)/.ok: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
	  && $(BIN)/uv pip install --python $(BIN)/python -e '.[dev]' \
	  || $(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
