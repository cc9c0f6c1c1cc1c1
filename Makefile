# make demo | check | test | lint | types | format | bench. The environment in .venv is made once, and again when its pins change.
PYTHON ?= python3
PROMPT ?= a red mushroom with a beige stem
BIN := .venv/bin
READY := .venv/.ready

demo: $(READY)
	$(BIN)/im3d generate --prompt "$(PROMPT)" --out out/demo --config.export.page=True

# What to run before every commit, in under two minutes.
check: lint types fast

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

types: $(READY)
	$(BIN)/mypy

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# These are left out, because they need meshes (--meshes DIR) or views of them (--views DIR).
NEED_DATA := $(addprefix benchmarks/,reconstruction.py mesh.py open3d_meshes.py pictures.py view_masks.py wrong_cameras.py)
bench: $(READY)
	for script in $(filter-out $(NEED_DATA),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# The interpreter must be checked here: pip would fail much later, and less clearly.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "im3d needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	# Python compiles what is imported; to compile all that is installed takes longer than to install it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.PHONY: demo check test fast lint types format bench
