# Needs make and a Python >= 3.11; `make install PYTHON=/path/to/python` chooses another one than .ci/find-python would.
PYTHON ?= $(shell .ci/find-python default)
LATEST_PYTHON ?= $(shell .ci/find-python newest)
# A test process takes 2 to 4 GB, and compiles on one core.
# One that hangs is ended (see pyproject.toml) and begun again; so few restarts keep that within the time of CI.
PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 2
# tests/conftest.py has XLA and LLVM optimize as little as they can, which saves two thirds of the time. Not so for
# numbers of whole compiled programs, or what looks at these. (Models are compared with PyTorch operation by operation.)
AS_USERS_HAVE_IT = JAX_DISABLE_MOST_OPTIMIZATIONS=0
EXACT = tests/parity/test_train_parity.py tests/generation/test_decode_hlo.py
NOTEBOOK_TESTS = tests/test_notebooks.py
# What depends on the versions of Python, JAX and the rest, beside EXACT and the fast part: parity without PyTorch, and
# each script once, end to end.
SCRIPTS = tests/generation/test_goldens.py \
  tests/test_notebooks.py::test_it_gives_the_outputs_that_it_stores[quickstart] $(addprefix tests/training/test_train_script.py::test_, \
  a_run_leaves_what_it_promises stops_as_asked_and_resumes_on_another_mesh)
# JAX's settings under which the fast part runs. Without jit it would take days: tests/test_jax_settings.py has a sample.
SETTINGS = JAX_ENABLE_X64=1 JAX_NUMPY_RANK_PROMOTION=raise JAX_NUMPY_DTYPE_PROMOTION=strict JAX_DEBUG_NANS=1 \
  JAX_DEFAULT_MATMUL_PRECISION=highest JAX_THREEFRY_PARTITIONABLE=0
SPHINX = -m sphinx --quiet --fail-on-warning -c docs
# Twice quiet: errors only.
PIP_INSTALL = -m pip install -qq --disable-pip-version-check
# What only tests use is compiled by those that import it: a small part of PyTorch and transformers, in two processes.
NO_COMPILE = --no-compile
# Compiles for TPUs without having one; exists for Linux on x86 only. The test that wants it skips elsewhere.
LIBTPU = $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),libtpu/.installed)

.PHONY: help install demo test test-exact test-others test-notebooks test-latest test-latest-exact test-latest-fast \
  test-exhaustive test-every-case test-settings environments lint notebooks docs docs-links clean

help:
	@echo "make install      create .venv with opt-jax and what it needs (CPU)"
	@echo "make demo         install, then convert, generate and train with the embedded model in a minute"
	@echo "make test         lint and the test suite, parity with PyTorch included"
	@echo "make test-notebooks  the notebooks give the outputs that they store"
	@echo "make test-latest  what depends on versions, on the newest Python and JAX found"
	@echo "make test-exhaustive  every case of the sweeps, compiled as users have it; JAX's settings: hours"
	@echo "make notebooks    run the notebooks of examples/ and store their outputs"
	@echo "make lint         ruff and pyright"
	@echo "make docs         the documentation site, in build/docs (README.md, docs/, notebooks, API reference)"
	@echo "make docs-links   whether the pages on the internet that the site links to exist"
	@echo "make clean        remove what the above have made"

install: .venv/.installed
demo: .venv/.installed
	.venv/bin/python examples/demo.py
# All three parts run, whatever the others say; the exit code tells whether one failed. Lint needs one core, for a minute.
test: .venv/.installed-test
	@$(MAKE) --no-print-directory lint & lint=$$!; \
	$(MAKE) --no-print-directory --keep-going test-exact test-others; tests=$$?; \
	wait $$lint || { echo "make lint failed, see above" >&2; exit 1; }; exit $$tests
test-exact: .venv/.installed-test $(addprefix .venv/,$(LIBTPU))
	$(AS_USERS_HAVE_IT) .venv/bin/python -m pytest $(PARALLEL) $(EXACT)
test-others: .venv/.installed-test $(addprefix .venv/,$(LIBTPU))
	.venv/bin/python -m pytest $(PARALLEL) $(addprefix --ignore ,$(EXACT) $(NOTEBOOK_TESTS))
# The notebooks, two at a time. CI runs them beside `make test`, which has other things to do for 15 minutes.
test-notebooks: .venv/.installed-test
	.venv/bin/python -m pytest $(PARALLEL) --dist load $(NOTEBOOK_TESTS)
test-latest:
	@$(MAKE) --no-print-directory --keep-going test-latest-exact test-latest-fast
test-latest-exact: .venv-latest/.installed-test $(addprefix .venv-latest/,$(LIBTPU))
	$(AS_USERS_HAVE_IT) .venv-latest/bin/python -m pytest $(PARALLEL) $(filter-out tests/parity/%,$(EXACT)) $(SCRIPTS)
test-latest-fast: .venv-latest/.installed-test $(addprefix .venv-latest/,$(LIBTPU))
	.venv-latest/bin/python -m pytest $(PARALLEL) -m "not slow" $(addprefix --ignore ,$(EXACT))
# With every case of the sweeps, and the code that users have; then the fast part under each of JAX's settings.
test-exhaustive:
	@$(MAKE) --no-print-directory --keep-going test-every-case test-settings
test-every-case: .venv/.installed-test $(addprefix .venv/,$(LIBTPU))
	$(AS_USERS_HAVE_IT) .venv/bin/python -m pytest $(PARALLEL) --exhaustive
test-settings: .venv/.installed-test $(addprefix .venv/,$(LIBTPU))
	@failed=; for setting in $(SETTINGS); do \
	  echo "$$setting:"; \
	  env $$setting .venv/bin/python -m pytest $(PARALLEL) -m "not slow and not default_settings" || failed="$$failed $$setting"; \
	done; test -z "$$failed" || { echo "failed under:$$failed" >&2; exit 1; }
lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/pyright -p .ci/pyright-core.json

# `make notebooks NOTEBOOKS=examples/quickstart.ipynb` runs one of them.
notebooks: .venv/.installed-test
	.venv/bin/python tests/support/notebooks.py $(NOTEBOOKS)

# A warning, such as a link to nothing, is an error. tests/test_site.py runs the same line. Notebooks are not executed.
docs: .venv/.installed-docs
	rm -rf build/docs build/doctrees
	.venv/bin/python $(SPHINX) -d build/doctrees . build/docs
	@echo "Open build/docs/index.html"
docs-links: .venv/.installed-docs
	.venv/bin/python $(SPHINX) -d build/doctrees-links -b linkcheck . build/links

# For .ci/run, which makes both at once: pip uses one core.
environments: $(foreach venv,.venv .venv-latest,$(venv)/.installed-test $(addprefix $(venv)/,$(LIBTPU)))

clean:
	rm -rf .venv .venv-latest .pytest_cache .ruff_cache build dist runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make pip run again when the dependencies change, and only then.
.venv/.installed: pyproject.toml | .venv/bin/python
	@echo "Installing opt-jax into .venv (JAX, Flax, Orbax: 800 MB on disk; a minute or two) ..."
	@.venv/bin/python $(PIP_INSTALL) --editable .
	@touch $@

.venv/.installed-docs: .venv/.installed
	@echo "Installing Sphinx and its theme into .venv (90 MB on disk; ten seconds) ..."
	@.venv/bin/python $(PIP_INSTALL) $(NO_COMPILE) --editable ".[docs]"
	@touch $@

.venv/.installed-test: .venv/.installed-docs
	@echo "Installing the test tools and PyTorch, the parity oracle, into .venv ..."
	@.venv/bin/python $(PIP_INSTALL) $(NO_COMPILE) --editable ".[test,oracle]"
	@touch $@

.venv-latest/.installed-test: pyproject.toml | .venv-latest/bin/python
	@echo "Installing opt-jax and its test tools into .venv-latest ..."
	@.venv-latest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager --editable .
	@.venv-latest/bin/python $(PIP_INSTALL) $(NO_COMPILE) --upgrade --upgrade-strategy eager --editable ".[test]"
	@touch $@

# The version that this jax asks for. Not among the packages: where libtpu can be imported, `import jax` loads it.
%/libtpu/.installed: %/.installed-test
	@echo "Installing libtpu, the compiler for TPUs, into $(@D) (700 MB on disk) ..."
	@rm -rf $(@D)
	@$*/bin/python $(PIP_INSTALL) --no-deps --target $(@D) "$$($*/bin/python -c \
	  'from importlib.metadata import requires; print(*{r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")})')"
	@touch $@

# Compiles for NVIDIA GPUs without having one (tests/test_gpu_programs.py). Nothing else needs it.
%/cuda/.installed: %/.installed-test
	@echo "Installing JAX's CUDA plug-in and NVIDIA's libraries into $(@D) (2.8 GB on disk) ..."
	@rm -rf $(@D)
	@$*/bin/python $(PIP_INSTALL) $(NO_COMPILE) --no-deps --target $(@D) $$($*/bin/python -c 'import jax; \
	  print(*(f"jax-cuda12-{name}=={jax.__version__}" for name in ("plugin", "pjrt")))') $(addprefix nvidia-, \
	  $(addsuffix -cu12,cuda-nvcc cuda-runtime cuda-cupti cuda-nvrtc cublas cudnn))
	@touch $@

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found: install one, or name it with PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv-latest/bin/python:
	@test -n "$(LATEST_PYTHON)" || { echo "No Python 3.12 or later found: install one, or name it with LATEST_PYTHON=..." >&2; exit 1; }
	"$(LATEST_PYTHON)" -m venv .venv-latest
