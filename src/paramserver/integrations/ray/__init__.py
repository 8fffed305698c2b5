"""Ray: runs from Python, and a trainer of Ray Train. Needs ``pip install "paramserver[ray]"``."""

import importlib.util

if importlib.util.find_spec("ray") is None:
    raise ImportError('paramserver.integrations.ray: Ray is not installed; install it: pip install "paramserver[ray]"')

from paramserver.integrations.ray.launch import launch
from paramserver.integrations.ray.train import ParameterServerConfig, ParameterServerTrainer
from paramserver.launch.ray_options import RayOptions

__all__ = ["ParameterServerConfig", "ParameterServerTrainer", "RayOptions", "launch"]
