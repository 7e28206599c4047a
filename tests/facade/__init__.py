"""Tests of the seed's classes."""
