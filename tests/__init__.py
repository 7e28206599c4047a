"""Tests of topkast_func, one file for each module of the package."""
