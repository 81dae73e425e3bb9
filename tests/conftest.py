"""Hypothesis for all tests: no time limit per example (machines are shared), and the same examples at every run."""

from hypothesis import settings

settings.register_profile("vcproxy", deadline=None, derandomize=True)
settings.load_profile("vcproxy")
