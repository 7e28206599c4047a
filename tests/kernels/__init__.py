"""Tests of the products of sparse layers."""
