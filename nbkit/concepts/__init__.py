"""Concepts: activations as sums of a few directions, and how much each direction matters to the model's decision.

>>> bank = factorize(activations, 10)          # NMF: activations [N, P] ~ codes [N, 10] @ dictionary [10, P]
>>> bank.encode(new), bank.decode(bank.codes), bank.error
>>> concept_importance(head, bank.codes, bank.dictionary, target=3)      # total Sobol index of each concept
>>> logits = head_on_codes(head, bank)         # the head as a function of the codes: thousands of cheap passes
"""

from __future__ import annotations

from nbkit.concepts._factorize import Factorization, factorize
from nbkit.concepts._head import head_on_codes
from nbkit.concepts._importance import concept_importance
from nbkit.concepts._nnls import nnls
from nbkit.concepts._sobol import total_sobol

__all__ = ["Factorization", "concept_importance", "factorize", "head_on_codes", "nnls", "total_sobol"]
