"""Ray: runs from Python, and a trainer of Ray Train. Needs ``pip install "paramserver[ray]"``."""

from paramserver.integrations.ray.launch import launch
from paramserver.integrations.ray.train import ParameterServerConfig, ParameterServerTrainer
from paramserver.launch.ray_options import RayOptions

__all__ = ["ParameterServerConfig", "ParameterServerTrainer", "RayOptions", "launch"]
