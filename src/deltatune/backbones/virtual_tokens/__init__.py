"""Virtual tokens: the one owner of masks, positions and caches where a delta lengthens a sequence.

`attend` joins keys and values after the cache update, through transformers' attention registry, on
every call, or gives them a softmax of their own there: caches and positions never hear of a prefix.
`embed` lengthens at the token stack and strips on the way out: heads, labels, pooling and the
caller's tensors are untouched, and the cache is marked with the number of virtual positions it
holds.
"""

from deltatune.backbones.virtual_tokens.attend import AttendSeam
from deltatune.backbones.virtual_tokens.embed import EmbedSeam
from deltatune.backbones.virtual_tokens.start import start_from_text

__all__ = ["AttendSeam", "EmbedSeam", "start_from_text"]
