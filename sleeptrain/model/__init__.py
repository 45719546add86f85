"""The network and the sleep loop; torch only: no rank, mesh, file or config system."""

from sleeptrain.model.sleep import SleepModel
from sleeptrain.model.visits import Visit, Window, cut, plan

__all__ = ["SleepModel", "Visit", "Window", "cut", "plan"]
