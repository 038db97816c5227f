PYTHON := .venv/bin/python

# The workers run what the driver runs, and Spark is the one in .venv.
export PYSPARK_PYTHON := $(abspath $(PYTHON))
export PYSPARK_DRIVER_PYTHON := $(abspath $(PYTHON))
unexport SPARK_HOME

# A file's tests run in one process: they share a session, and what it costs to start one.
IN_TWO = -n 2 --dist loadfile

WITH_JAVA = JAVA_HOME="$$(bash scripts/java-home.sh)"

.DEFAULT_GOAL := help
.PHONY: help java setup demo test test-unit test-models test-cluster test-matrix bench bench-peers \
	docs check format release-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Make .venv and install everything into it (the others do it when needed)
	@bash scripts/setup.sh

# Asked for first: what it says comes before minutes of installing.
java:
	@bash scripts/java-home.sh >/dev/null

demo: java setup ## Find each photo's nearest neighbours, offline, and draw a contact sheet
	@$(WITH_JAVA) $(PYTHON) examples/demo.py

test: java setup ## Run the tests, and report their coverage
	@$(WITH_JAVA) $(PYTHON) -m pytest $(IN_TWO) --cov --cov-report=term:skip-covered

test-unit: setup ## Run those that need no Java and build no large models (under 2 minutes)
	@$(PYTHON) -m pytest -m 'not java and not models'

test-models: setup ## Build all models of torchvision
	@IMAGEVEC_TEST_ALL_MODELS=1 $(PYTHON) -m pytest tests/models/test_torchvision.py

test-cluster: java setup ## Test on clusters, Spark Connect, streams, and the command line
	@$(WITH_JAVA) $(PYTHON) -m pytest $(IN_TWO) tests/cluster
	@$(WITH_JAVA) $(PYTHON) -m pytest tests/connect

test-matrix: java setup ## Test the lowest versions of all dependencies, and other PySparks
	@$(WITH_JAVA) bash scripts/test-matrix.sh

bench: java setup ## Compare features_udf with the usual ways of doing it (30 minutes)
	@$(WITH_JAVA) $(PYTHON) -m benchmarks.run

bench-peers: java setup ## Compare it with Ray Data and Daft, in an environment of their own
	@$(WITH_JAVA) $(PYTHON) -m benchmarks.peers.run

docs: setup ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

check: setup ## Lint, check the format, the types and the layers
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports --no-cache

format: setup ## Format the code, and fix what the linter can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

release-check: java ## Build the sdist and the wheel, and try the wheel in a new environment
	@$(WITH_JAVA) bash scripts/release-check.sh

clean: ## Remove all that is made: .venv, caches, outputs
	rm -rf .venv .cache .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site *.egg-info
	rm -rf demo_output spark-warehouse metastore_db derby.log artifacts
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
