"""Tests of many processes: pairs of them, on one machine."""
