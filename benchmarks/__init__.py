"""Measurements of topkast_func, and the pictures drawn from them."""
