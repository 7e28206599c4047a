"""Tests of topkast_func.data."""
