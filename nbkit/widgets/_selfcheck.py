"""Checking that every control of every explorer of a notebook does something, and that nothing it does fails."""

from __future__ import annotations

from nbkit.widgets import _controls
from nbkit.widgets._explorer import Explorer, alive


def selfcheck(*, most: int = 8) -> None:
    """Move every control of every explorer through its range and print one line that is the same in every run.

    A slider takes both ends and its middle, a menu up to ``most`` options, a tick box both states. Every explorer is
    left as it was. A control passes where at least one of its values changes the picture; if none does while the
    others stand as they were, the others are moved too.

    Raises: AssertionError naming the explorer and the control, where ``render`` raises or draws another picture for
    the same values, where a control never changes the picture, and where there is no explorer to check.

    >>> selfcheck()
    selfcheck: 2 explorers, 5 controls, every control answers
    """
    if not alive:
        raise AssertionError("selfcheck: there is no explorer in this notebook")
    problems = [problem for explorer in list(alive) for problem in _check(explorer, most)]
    if problems:
        raise AssertionError("selfcheck: " + "; ".join(problems))
    controls = sum(len(explorer.controls) for explorer in alive)
    print(
        f"selfcheck: {len(alive)} explorer{'s' * (len(alive) != 1)}, {controls} control{'s' * (controls != 1)}, "
        "every control answers"
    )


def _check(explorer: Explorer, most: int) -> list[str]:
    before = {name: _controls.state(widget) for name, widget in explorer.controls.items()}
    # keyed by message: the same failure at many values is one problem
    problems: dict[str, None] = {}
    try:
        _note_error(explorer, problems)
        if explorer.error is None and explorer._draw(explorer.values) != explorer._png:
            problems[f"{explorer.name} draws another picture for the same values; seed what is random in it"] = None
        for name in explorer.controls:
            try:
                answered = _answers(explorer, name, before, most, problems)
            except TypeError as error:
                problems[f"{explorer.name}: control {name!r}: {error}"] = None
                continue
            finally:
                _restore(explorer, before)
            if not answered:
                problems[f"{explorer.name}: control {name!r} never changes the picture"] = None
    finally:
        _restore(explorer, before)
    return list(problems)


def _answers(explorer: Explorer, name: str, before: dict, most: int, problems: dict) -> bool:
    """Whether some value of the control changes the picture; visits all of its samples either way."""
    if _differs(explorer, name, most, problems):
        return True
    for other, widget in explorer.controls.items():
        for state in _controls.samples(widget, 3) if other != name else ():
            _move(explorer, other, state)
            if _differs(explorer, name, 3, problems):
                return True
            _restore(explorer, before)
    return False


def _differs(explorer: Explorer, name: str, most: int, problems: dict) -> bool:
    pictures = {_picture(explorer)}
    for state in _controls.samples(explorer.controls[name], most):
        _move(explorer, name, state)
        _note_error(explorer, problems)
        pictures.add(_picture(explorer))
    return len(pictures - {None}) > 1


def _picture(explorer: Explorer) -> bytes | None:
    return None if explorer.error is not None else explorer._png


def _note_error(explorer: Explorer, problems: dict) -> None:
    if explorer.error is not None:
        kind, message = type(explorer.error).__name__, str(explorer.error)
        problems[f"{explorer.name} raised {kind} at {explorer._settings()}: {message}"] = None


def _move(explorer: Explorer, name: str, state: tuple) -> None:
    with explorer.holding():
        setattr(explorer.controls[name], *state)


def _restore(explorer: Explorer, before: dict) -> None:
    with explorer.holding():
        # twice: a control whose range follows a later one takes its old value only once that one has moved back
        for name, state in 2 * list(before.items()):
            setattr(explorer.controls[name], *state)
