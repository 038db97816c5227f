PYTHON := .venv/bin/python

# Workers use the same Python as the driver, and Spark comes from .venv.
export PYSPARK_PYTHON := $(abspath $(PYTHON))
export PYSPARK_DRIVER_PYTHON := $(abspath $(PYTHON))
unexport SPARK_HOME

# The tests of a file run in one process, so that they share what its fixtures set up.
IN_TWO = -n 2 --dist loadfile --no-loadscope-reorder

WITH_JAVA = JAVA_HOME="$$(bash scripts/java-home.sh)"

.DEFAULT_GOAL := help
.PHONY: help java setup demo test test-unit test-models test-cluster test-kills test-matrix \
	test-tables bench bench-peers docs check format release-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create .venv and install everything into it (the other targets do so when needed)
	@bash scripts/setup.sh

# Runs first, so that an error appears before minutes of installing.
java:
	@bash scripts/java-home.sh >/dev/null

demo: java setup ## Find the nearest neighbours of photos, offline, and draw a contact sheet
	@$(WITH_JAVA) $(PYTHON) examples/demo.py

test: java setup ## Run the tests, and report their coverage
	@$(WITH_JAVA) $(PYTHON) -m pytest $(IN_TWO) --cov --cov-report=term:skip-covered

test-unit: setup ## Run the tests that need no Java and build no large models (under 2 minutes)
	@$(PYTHON) -m pytest -m 'not java and not models'

test-models: setup ## Test further models: of torchvision up to 16 GFLOPs, open_clip and transformers
	@$(PYTHON) -m pytest -n 2 -m all_models tests/models

test-cluster: java setup ## Test on clusters, Spark Connect, streams, and the command line
	@$(WITH_JAVA) $(PYTHON) -m pytest $(IN_TWO) tests/cluster
	@$(WITH_JAVA) $(PYTHON) -m pytest tests/connect

test-kills: java setup ## Kill extractions to S3 and, if azurite is installed, to Azure
	@$(WITH_JAVA) $(PYTHON) -m pytest tests/kills

test-matrix: java setup ## Test the lowest versions of all dependencies, and other PySparks
	@$(WITH_JAVA) bash scripts/test-matrix.sh

test-tables: java setup ## Test tables of Delta and Iceberg, with a PySpark that both support
	@$(WITH_JAVA) bash scripts/test-tables.sh

bench: java setup ## Compare features_udf with the usual approaches (30 minutes)
	@$(WITH_JAVA) $(PYTHON) -m benchmarks.run

bench-peers: java setup ## Compare features_udf with Ray Data and Daft, in a separate environment
	@$(WITH_JAVA) $(PYTHON) -m benchmarks.peers.run

docs: setup ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

check: setup ## Lint, and check format, types and layers
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-cache

format: setup ## Format the code, and apply the linter's fixes
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

release-check: java ## Build the sdist and the wheel, and try the wheel in a new environment
	@$(WITH_JAVA) bash scripts/release-check.sh

clean: ## Remove all generated files: .venv, caches, outputs
	rm -rf .venv .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site *.egg-info
	rm -rf demo_output spark-warehouse metastore_db derby.log artifacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
