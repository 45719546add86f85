"""Whether a Ray cluster is reachable, safe and big enough for a run."""

import ipaddress
import logging
import os
import socket
import sys
import time

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.autoscaler.sdk import request_resources

from sleeptrain.config import Config
from sleeptrain.schema import ConfigError

CONNECT_SECONDS, POLL_SECONDS = 10.0, 1.0


def connect(config: Config, namespace: str) -> None:
    """Joins the cluster that runs this job, or the one on this machine. Raises ConfigError where there is
    none, where it runs another Python, and where strangers could use it."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if address != "auto":  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, namespace=namespace, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cluster=ray finds no Ray cluster at RAY_ADDRESS={address}; submit the run with "
            "launchers/ray_submit.sh, or start a cluster here with launchers/ray_local.sh"
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" in str(error):
            raise ConfigError(
                f"this Python ({sys.executable}) differs from that of the cluster: "
                f"{' '.join(str(error).split())}; start the head from the same environment"
            ) from error
        raise
    _refuse_open_cluster(config)


def _refuse_open_cluster(config: Config) -> None:
    """Whoever reaches an unauthenticated cluster runs any code on it."""
    addresses = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    reachable = sorted(a for a in addresses if not ipaddress.ip_address(a).is_loopback)
    if reachable and not is_token_auth_enabled() and not config.cluster.allow_unauthenticated:
        raise ConfigError(
            f"the Ray cluster listens on {', '.join(reachable[:3])} and asks nobody for a token, so that "
            "anyone who reaches it can run code on it; start it with RAY_AUTH_MODE=token "
            "(launchers/README.md), or set cluster.allow_unauthenticated=true on a network of your own"
        )


def check_resources(config: Config) -> bool:
    """Whether workers get GPUs; waits for nodes that are to join, and raises ConfigError where the cluster
    has too few for all even then."""
    cluster = config.cluster
    needed = cluster.min_workers or cluster.workers(config.parallel)
    deadline, is_told = time.monotonic() + cluster.resources_wait_seconds, False
    while True:
        there = ray.cluster_resources()
        use_gpu = config.run.device == "cuda" or (config.run.device == "auto" and there.get("GPU", 0) > 0)
        kind = "GPU" if use_gpu else "CPU"
        if there.get(kind, 0) >= needed:
            if is_told:
                request_resources(bundles=[])  # Ray Train asks for its own from here on
            return use_gpu
        if time.monotonic() > deadline:
            setting = "min_workers" if cluster.min_workers else "num_workers"
            raise ConfigError(
                f"cluster.{setting}={needed} needs {needed} {kind}s, and the Ray cluster has "
                f"{there.get(kind, 0):g}; add nodes or start fewer workers"
            )
        if not is_told:
            # Where a cluster scales by itself, this makes it grow.
            request_resources(bundles=[{kind: 1}] * needed)
            print(f"waiting for {needed} {kind}s; the Ray cluster has {there.get(kind, 0):g}", flush=True)
            is_told = True
        time.sleep(POLL_SECONDS)
