"""Conformance suites, for us and for whoever writes a method: see `testing.methods.laws`."""
