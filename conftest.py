"""Loaded whatever part of the kit pytest is asked to test: a notebook alone, too."""

pytest_plugins = ["tests.notebooks.plugin"]
