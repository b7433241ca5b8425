"""The laws of methods, L1 to L12 and those of the house, as one suite.

    @pytest.mark.parametrize("law", laws(), ids=lambda law: law.__name__)
    def test_law(law, tmp_path): law(Case("mine(rank=2)", "llama"), tmp_path)

No law asks which method it has. It asks what the method declares: whether a fresh delta is the
identity, whether it trains in place, which leaves mathematics leaves without a gradient.
"""

from __future__ import annotations

from deltatune.testing import compiled_laws, function_laws, life_laws
from deltatune.testing.case import Case, Law

__all__ = ["Case", "Law", "laws"]


def laws(*, slow: bool = False) -> tuple[Law, ...]:
    """Every law: those of the function first, then those of a delta's life.

    Args:
        slow: also those that take longer than all others together.
    """
    return tuple(
        value
        for module in (function_laws, life_laws, *([compiled_laws] if slow else []))
        for name, value in vars(module).items()
        if name.startswith("law_")
    )
