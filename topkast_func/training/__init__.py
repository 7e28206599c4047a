"""The state, the step that takes it to the next one, and what goes with them.

Uses storages, models, masks and the configuration; knows nothing of reports or facades.
"""
