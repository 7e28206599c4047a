"""What is on a disk: tensors packed, laid out, under checksums, and replaced whole.

Uses the names of types; knows nothing of states, configurations or models.
"""
