"""Other policies with the interface of the core's ``Controller``: they run live and simulated as it does.

`docs/baselines.md` says of each what it does, where it comes from, and where it departs from its source.
"""

from sponge.sim.baselines.adaptive import OnlineFitBatcher
from sponge.sim.baselines.horizontal import HorizontalController
from sponge.sim.baselines.published import PublishedAllocation, PublishedController
from sponge.sim.baselines.static import StaticController
from sponge.sim.baselines.vertical import RecommenderController
from sponge.sim.baselines.window import QueueTimeoutBatcher

__all__ = [
    "HorizontalController",
    "OnlineFitBatcher",
    "PublishedAllocation",
    "PublishedController",
    "QueueTimeoutBatcher",
    "RecommenderController",
    "StaticController",
]
