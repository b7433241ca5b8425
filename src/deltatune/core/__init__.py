"""The kernel: sites, targets, methods, chains, the bank, deltas and their files.

It knows places and faces. It knows no method, no family of models and no task by name: those
register themselves, and are found through the registries.
"""
