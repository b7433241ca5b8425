.PHONY: setup demo test check clones docs cards matrix parity pairs fuzz faults kill studies bench bench-quick

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

cards:
	@scripts/cards

matrix:
	@scripts/matrix

parity:
	@scripts/parity

pairs:
	@scripts/pairs

fuzz:
	@scripts/fuzz

faults:
	@scripts/faults

kill:
	@scripts/kill

studies:
	@scripts/studies

bench:
	@scripts/bench

bench-quick:
	@scripts/bench --quick
