"""What training is asked to do: which parameters are sparse, how sparse, and when that changes.

Uses the methods, rankings and checks; knows nothing of models, storages or steps.
"""

from topkast_func.config.allocation import allocate
from topkast_func.config.selection import first_weight, last_weight
from topkast_func.config.topkast_config import TopKastConfig

__all__ = ["TopKastConfig", "allocate", "first_weight", "last_weight"]
