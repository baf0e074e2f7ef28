"""Does an attribution say what the model does? Checks that need the model, or a known object, and no human eye.

``maps`` are attributions: ``[N, H, W]``, or shaped like the inputs (several channels of a pixel are added up). Of
inputs ``[N, T, F]`` they are ``[N, T]`` for tokens, or ``[N, T, F]`` for every number.

============================  ======================================================================================
:func:`deletion`              remove the most important pixels first: the score should fall early (low area)
:func:`insertion`             show the most important pixels first: the score should rise early (high area)
:func:`infidelity`            do attributions predict what a perturbation does to the score? (low)
:func:`pointing_game`         is the maximum on the object?
:func:`energy_share`          how much of the map lies on the object?
:func:`randomization_check`   does the map change when the model's weights are randomised? (low correlation)
:func:`rank_correlation`      Spearman correlation of two sets of maps
============================  ======================================================================================
"""

from __future__ import annotations

from nbkit.faithfulness._curves import Curve, deletion, insertion
from nbkit.faithfulness._infidelity import infidelity
from nbkit.faithfulness._maps import rank_correlation
from nbkit.faithfulness._objects import energy_share, pointing_game
from nbkit.faithfulness._randomise import Randomization, randomization_check

__all__ = [
    "Curve", "Randomization", "deletion", "energy_share", "infidelity", "insertion", "pointing_game",
    "randomization_check", "rank_correlation",
]  # fmt: skip
