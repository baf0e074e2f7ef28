"""A training loop that can be read in one sitting.

>>> history = fit(model, (x, y), epochs=5, lr=1e-3, validation=(x_val, y_val))   # doctest: +SKIP
>>> history.frame.plot(y=["loss", "val_loss"])                                   # doctest: +SKIP
>>> attack = functools.partial(pgd, eps=0.1, steps=5)                            # doctest: +SKIP
>>> fit(model, (x, y), epochs=5, adversary=lambda m, x, y, g: attack(m, x, y, generator=g))   # doctest: +SKIP
"""

from nbkit.training._evaluate import accuracy, evaluate
from nbkit.training._examples import example_gradients, gradient_norms
from nbkit.training._loop import OPTIMIZERS, History, cosine, fit
from nbkit.training._pgd import pgd
from nbkit.training._state import recalibrate, state

__all__ = [
    "OPTIMIZERS",
    "History",
    "accuracy",
    "cosine",
    "evaluate",
    "example_gradients",
    "fit",
    "gradient_norms",
    "pgd",
    "recalibrate",
    "state",
]
