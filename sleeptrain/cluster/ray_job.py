"""How far the run is, in the metadata of its Ray job: ``ray job list`` and the dashboard show it."""

import asyncio
import json
import os
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.dashboard.modules.job.common import JobInfoStorageClient

SHOWN = ("starts", "processes", "shards", "step", "train/loss", "train/tokens_per_second")


class JobMetadata:
    """Of the job that this driver is, if it is one; else ``show`` does nothing."""

    def __init__(self) -> None:
        job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
        self._job = job.get("metadata", {}).get("job_submission_id", "")
        self._shown: dict[str, str] = {}
        if self._job:
            self._store = JobInfoStorageClient(GcsClient(address=ray.get_runtime_context().gcs_address))

    def show(self, status: dict[str, Any]) -> None:
        """Replaces what was shown before."""
        shown = {f"sleeptrain/{name}": str(status[name]) for name in SHOWN if name in status}
        if self._job and shown != self._shown:
            asyncio.run(self._put(shown))
            self._shown = shown

    async def _put(self, shown: dict[str, str]) -> None:
        info = await self._store.get_info(self._job)
        if info is not None and not info.status.is_terminal():
            info.metadata = (info.metadata or {}) | shown
            await self._store.put_info(self._job, info)
