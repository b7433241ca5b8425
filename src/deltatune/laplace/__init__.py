"""A Gaussian posterior over the leaves of a trained delta, and predictions that know of it.

Yang et al. 2023, arXiv:2308.13111 (Laplace-LoRA), for any delta whose leaves are trained.
"""

from deltatune.laplace.files import load
from deltatune.laplace.fitting import fit
from deltatune.laplace.posterior import Posterior

__all__ = ["Posterior", "fit", "load"]
