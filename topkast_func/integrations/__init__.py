"""Callbacks for other people's tools.

Uses the training, the reports and the facade; each module needs a package of its own, an extra.
"""
