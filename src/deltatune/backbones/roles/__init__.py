"""One table per family: what its modules are. A new family is a new file here, a few lines long."""

from deltatune.backbones.roles import bert, gpt2, llama, t5

__all__ = ["bert", "gpt2", "llama", "t5"]
