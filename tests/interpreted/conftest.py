"""Warnings of Triton's interpreter, which computes with numpy, are about the interpreter."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def interpreters_own_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
        # of rows that nobody owns and nobody stores: they hold what the memory held
        warnings.filterwarnings("ignore", ".*encountered in", RuntimeWarning)
        yield
