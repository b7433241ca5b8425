"""One table per family: what its modules are. A new family is a new file here, a few lines long."""

from deltatune.backbones.roles import bart, bert, deberta_v2, deepseek, gpt2, llama, roberta, t5

__all__ = ["bart", "bert", "deberta_v2", "deepseek", "gpt2", "llama", "roberta", "t5"]
