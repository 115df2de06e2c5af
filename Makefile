# Each target does its own set-up: system packages by apt-get, nginx from the crate nginx-src, Consul from Debian.
SHELL = /bin/bash
.DEFAULT_GOAL = help
.PHONY: help demo test test-full test-nginx test-stack check build bench bench-table soak asan fuzz mutants coverage consul clean

help: ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: ## builds the module and shows it at work, with a Consul, an nginx and three backends of its own
	@scripts/setup consul && scripts/fetch-consul >/dev/null && scripts/build && scripts/demo

test: ## unit tests, whole-system tests and the demo; T=NAME: only the tests with NAME in their name
	@scripts/setup consul && scripts/fetch-consul >/dev/null && scripts/build && scripts/test

test-full: ## the whole-system tests at the size of their bars, on each nginx of scripts/test-nginx; N=NAME, T=NAME: as test-nginx
	@TEST_FULL=1 $(MAKE) --no-print-directory test-nginx

test-nginx: ## the whole-system tests on each nginx of scripts/test-nginx; N=NAME: on one of them; T=NAME: tests with NAME in their name
	@scripts/setup consul && scripts/fetch-consul >/dev/null && scripts/test-nginx $(N)

test-stack: ## the images, compose.yaml and the registrar in it; needs Docker; T=NAME: tests with NAME in their name
	@scripts/setup && scripts/test-stack

check: ## format, lints, and the licences and sources of the dependencies
	@scripts/setup && scripts/check

build: ## the module, in target/modules; NGINX_SOURCE_DIR=DIR (and NGINX_BUILD_DIR=DIR): for an nginx of your own
	@scripts/setup && scripts/build

bench: ## the benchmarks; B=NAME: one of them; QUICK=1: in short; BEFORE=DIR: in turns with an earlier build's modules in DIR
	@scripts/setup consul && scripts/fetch-consul >/dev/null && scripts/build && \
	  cargo build --release --locked -p failpoints --features failpoints && scripts/bench

bench-table: ## all benchmarks in one run, and their figures in one table
	@scripts/setup consul && scripts/fetch-consul >/dev/null && scripts/build && \
	  cargo build --release --locked -p failpoints --features failpoints && scripts/bench-table

soak: ## changes, reloads, kills and restarts of Consul under load, for MINUTES=20, and what grew meanwhile
	@$(MAKE) --no-print-directory bench B=soak

asan: ## the whole-system tests with nginx and the module under AddressSanitizer; T=NAME; needs clang and a nightly Rust
	@scripts/setup consul && scripts/asan

fuzz: ## the fuzz targets, MINUTES=10 each; F=NAME: one of them; needs a nightly Rust
	@scripts/setup && scripts/fuzz

mutants: ## cargo-mutants over the judgement and the watch: which changes of them no test would notice
	@scripts/setup && scripts/mutants

coverage: ## which lines of crates/consul-watch its own tests run
	@scripts/setup && scripts/coverage

consul: ## a Consul for the demo and the tests: CONSUL_BIN, the one on the PATH, or Debian 11's; prints its path
	@scripts/setup consul && scripts/fetch-consul

clean: ## removes everything that was built
	cargo clean
