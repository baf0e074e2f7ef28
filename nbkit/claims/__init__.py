"""Recording whether a claim holds here: the figures, the rule set before looking, its chance, and the verdict.

A notebook computes ``holds`` from its own runs and states the verdict it expects. :func:`check` fails the cell where
the two part, so a stored verdict is one that is still true. Everything is kept in the cell's output, where
:func:`collect` reads it; ``python -m nbkit.papers index`` makes ``CLAIMS.md`` of it.

>>> claims.figure([.61, .58, .66], unit="p / p0")     # the one rounding of table, page and prose
'0.617 ± 0.040 p / p0'
>>> claims.again(stored, now, within=0.002)           # a part of a stored table, measured again
12 values again: all within 0.002 of the stored ones
"""

from __future__ import annotations

from nbkit.claims._again import again
from nbkit.claims._check import VerdictChanged, check
from nbkit.claims._collect import collect
from nbkit.claims._figures import figure
from nbkit.claims._record import FAILS, HOLDS, KINDS, MIME, MIXED, UNTESTED, VERDICTS, Claim, Gain

__all__ = [
    "FAILS", "HOLDS", "KINDS", "MIME", "MIXED", "UNTESTED", "VERDICTS", "Claim", "Gain", "VerdictChanged",
    "again", "check", "collect", "figure",
]  # fmt: skip
