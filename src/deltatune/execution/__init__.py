"""Execution: tasks, backbones, the kernel, training and evaluation meet to carry out cells."""
