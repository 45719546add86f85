"""Tells the workers of Ray Train where rank 0 is. Apart from the driver, for every worker imports it."""

import os
from typing import Any

from ray.train.backend import Backend, BackendConfig


class Rendezvous(BackendConfig):
    """The processes that train form the group, not the workers."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Rendezvous


class _Rendezvous(Backend):
    share_cuda_visible_devices = True  # of a node, so that LOCAL_RANK counts them

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        from ray.train._internal.utils import get_address_and_port

        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_master, address, str(port))


def _set_master(address: str, port: str) -> None:
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": port}
