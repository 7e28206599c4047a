"""The model at other tensors: α, functional calls, linear layers lent to the kernels.

Uses the masks and the kernels; knows nothing of storages, optimisers or steps.
"""
