"""How a state keeps its weights: all of θ with masks, or the values of B alone.

Uses the model's α and the kernels' patterns; knows nothing of optimisers or steps.
"""
