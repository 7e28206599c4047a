"""Many processes that train one state: buckets, checks between ranks, checkpoints in a folder.

Uses `torch.distributed` on trees of tensors; knows nothing of sets or states.
"""
