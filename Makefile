.PHONY: setup demo test check clones docs

setup:
	@scripts/setup

demo:
	@scripts/demo

test:
	@scripts/check
	@scripts/test

check:
	@scripts/check

clones:
	@scripts/clones

docs:
	@scripts/docs
