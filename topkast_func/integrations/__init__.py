"""Callbacks for other people's tools.

Uses the training and the reports; each module needs a package of its own, an extra.
"""
