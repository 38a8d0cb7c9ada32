# Each target is a short script, which says in its head what it does; CI runs the same ones.
.DEFAULT_GOAL := help
.PHONY: help run test lint bench venv weights install clean clean-weights

PREFIX ?= /opt/citadel
DESTDIR ?=
export PREFIX DESTDIR

help: ## this text
	@echo 'citadel-supervisor: make TARGET, where TARGET is one of'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## run the demo: four models on 11400-11403, router on 8000 (makes what it needs first)
	@scripts/run

test: ## style, types and all tests, on every Python 3.11 to 3.13 that is installed
	@scripts/test

lint: ## style and types only
	@scripts/lint

bench: ## all benchmarks, one after another
	@scripts/bench

venv: ## make or update .venv
	@scripts/venv

weights: ## make the demo checkpoint in the cache directory
	@scripts/weights

install: ## install for a real host: PREFIX (/opt/citadel), DESTDIR (for packaging)
	@scripts/install

clean: ## remove environments and caches from this tree; made weights stay
	rm -rf .venv .venv-* .venv*.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-weights: ## remove made checkpoints and their downloads from the cache directory
	@scripts/clean-weights
