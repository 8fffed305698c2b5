"""The destinations of a reduction: devices, in all the ways in which programs name them.

Rules
    * A device of a ps means this host: data for a ps is sent from there.
    * No worker reduces to another worker; the chief counts as a worker.
"""

from __future__ import annotations

from typing import Any

import torch

from paramserver.cluster import Role, parse_role
from paramserver.distribute.core.devices import Device, default_device
from paramserver.distribute.core.values import Mirrored, local_results
from paramserver.distribute.core.worker import Worker

Destinations = Any
"""A device or its name; or a variable, tensor or distributed value, which means the devices that it is on.

None means torch's default device: the host, unless a program sets another.
"""

TorchDevices = tuple[torch.device, ...]


def places(destinations: Destinations) -> TorchDevices:
    """Return destinations as torch devices, as seen by this task; a distributed value has one for each component.

    >>> places("/job:ps/task:1")
    (device(type='cpu'),)

    Raises:
        ValueError: If the destinations are invalid or empty.
        AssertionError: If the destinations are a list or a tuple.
    """
    if destinations is None:
        return (default_device(),)
    return tuple(torch.device("cpu") if device.job == Role.PS else device.torch_device for device in _all(destinations))


def places_for(strategy: Worker, destinations: Destinations, call: str) -> TorchDevices:
    """Return destinations as `places` does, and check that none of them is on another worker.

    Raises:
        ValueError: As `places`, or if a destination is on another worker.
        AssertionError: As `places`.
    """
    if destinations is not None:
        for device in _all(destinations):
            _check_is_no_other_worker(strategy, device, call)
    return places(destinations)


def put(value: Any, places: TorchDevices) -> Any:
    """Move a tensor to a single place, or to several as `Mirrored`; return any other value as it is.

    A tensor that is at a place already is not copied.

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
    if isinstance(destination, torch.Tensor) or hasattr(destination, "assign"):  # a variable, not imported here
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
