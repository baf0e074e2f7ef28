"""Notebooks written before some of the rules were. The set shrinks to nothing as they are written anew."""

FIRST_EDITIONS: set[str] = set()
EXCUSED = {
    "formatted", "headed", "brief", "few_statements", "short_cells", "plain", "hidden", "exercised", "claim",
    "main_picture",
}  # fmt: skip
"""The rules that a first edition may break."""
