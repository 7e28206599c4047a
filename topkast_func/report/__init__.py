"""What a person wants to see of a state or a run: tables, pictures, operations, matrices.

Uses the training; nothing computes with what stands here.
"""
