"""Conformance suites, for us and for whoever writes a method: `deltatune.testing.methods.laws()`."""
