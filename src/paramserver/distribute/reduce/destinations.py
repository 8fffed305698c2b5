"""Where the result of a reduction is to be: devices by any of the ways in which programs name them.

Rules
    * A device of a ps stands for the host: what is on its way to a ps is sent from there.
    * No worker reduces to another one; chief and workers are one family.
"""

from __future__ import annotations

from typing import Any

import torch

from paramserver.cluster import Role, parse_role
from paramserver.distribute.core.devices import Device, default_device
from paramserver.distribute.core.values import Mirrored, local_results
from paramserver.distribute.core.worker import Worker

Destinations = Any
"""A device or its name, or a variable, a tensor or a distributed value, which stand for the devices that they are on.

None stands for torch's default device: the host, unless a program sets another.
"""

TorchDevices = tuple[torch.device, ...]


def places(destinations: Destinations) -> TorchDevices:
    """Destinations as torch's devices, seen from this task; a distributed value has one for each component.

    >>> places("/job:ps/task:1")
    (device(type='cpu'),)

    Raises:
        ValueError: If they are none, or empty.
        AssertionError: If they are a list or a tuple.
    """
    if destinations is None:
        return (default_device(),)
    return tuple(torch.device("cpu") if device.job == Role.PS else device.torch_device for device in _all(destinations))


def places_for(strategy: Worker, destinations: Destinations, call: str) -> TorchDevices:
    """`places`, for a call of a strategy that must not reach another worker.

    Raises:
        ValueError: As `places`, or if a destination is another worker's.
        AssertionError: As `places`.
    """
    if destinations is not None:
        for device in _all(destinations):
            _check_is_no_other_worker(strategy, device, call)
    return places(destinations)


def put(value: Any, places: TorchDevices) -> Any:
    """A tensor at a single place, `Mirrored` at several; what is no tensor has no place and is returned as it is.

    A tensor that is in a place already is not copied.

    >>> put(torch.ones(1), (torch.device("cpu"), torch.device("cpu"))).values
    (tensor([1.]), tensor([1.]))
    """
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(places[0]) if len(places) == 1 else Mirrored([value.to(place) for place in places])


def _all(destinations: Destinations) -> tuple[Device, ...]:
    if isinstance(destinations, (list, tuple)):
        raise AssertionError(
            f"destinations must not be a {type(destinations).__name__}, got {destinations!r}; "
            "pass a distributed value for several"
        )
    if isinstance(destinations, str) and not destinations:
        raise ValueError("destinations can not be empty: expected the name of a device, such as 'cpu:0'")
    return tuple(map(_device, local_results(destinations)))


def _device(destination: Any) -> Device:
    if isinstance(destination, (str, torch.device, Device)):
        return Device.parse(destination)
    if isinstance(destination, torch.Tensor) or hasattr(destination, "assign"):  # which is what a variable has
        return Device.parse(destination.device)
    raise ValueError(
        "destinations must be one of: the name of a device, a variable, a tensor, a distributed value of these; "
        f"got {destination!r}"
    )


def _check_is_no_other_worker(strategy: Worker, device: Device, call: str) -> None:
    if not device.job:
        return
    own = Device.parse(strategy.worker_devices[0])
    if own.job and device.is_remote(own.job, own.task) and parse_role(device.job).trains:
        raise ValueError(
            f"{call}: Cannot reduce to another worker: {device} is not of this task, {own.job}:{own.task}; "
            "reduce to a device of this task, or to a ps"
        )
