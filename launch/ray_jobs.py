"""Jobs of a Ray cluster through its job API: sent, followed, listed, stopped. A Ray door.

`submit_address.settle_access` comes first: Ray reads from the environment how it shows a token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from cuboid.launch.failures import STOPPED
from cuboid.parallel.errors import RunFailed, UserError

OWN = "cuboid"
"""Metadata that marks a job of `cuboid submit`: the version that was sent."""

_SILENCE_SECONDS = 60.0
"""Without a line so long, the connection is made anew: a laptop that slept does not learn that it is gone."""
_POLL_SECONDS = 1.0


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """Raises UserError where the cluster does not take the token."""
        for handler in logging.getLogger("ray").handlers:  # the job API's own loggers set themselves to INFO
            handler.setLevel(logging.ERROR)
        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            raise UserError(f"the cluster at {address} does not take the token of the environment") from error
        except (ConnectionError, RuntimeError) as error:
            raise UserError(f"no Ray job API answers at {address}: {_first_line(error)}") from error

    def submit(
        self, job: str, folder: Path, command: str, *, environment: Mapping[str, str], about: Mapping[str, str]
    ) -> None:
        """Send a folder, and have the cluster run a shell command in a copy of it.

        Args:
            job: the name by which it will be known; unique on the cluster.
            folder: becomes the working directory of the command and of all that it starts, first on PYTHONPATH.
            command: run on the head node.
            environment: variables of the command and of all that it starts.
            about: shown by `submitted`.
        """
        os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # all of the folder is meant
        runtime = {"working_dir": str(folder), "env_vars": dict(environment)}
        try:
            self._client.submit_job(entrypoint=command, submission_id=job, runtime_env=runtime, metadata=dict(about))
        except (RuntimeError, requests.RequestException) as error:
            raise RunFailed(f"the cluster does not take the job: {_first_line(error)}") from error

    def submitted(self) -> list[JobDetails]:
        """Those of `cuboid submit`, newest first."""
        jobs = [job for job in self._ask(self._client.list_jobs) if OWN in (job.metadata or {})]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def details(self, job: str) -> JobDetails:
        """Raises UserError where the cluster knows no such job."""
        found = self._ask(self._client.get_job_info, job)
        if found.type != JobType.SUBMISSION:
            raise UserError(f"{job} was not submitted, but started by a program of its own")
        return found

    def logs(self, job: str) -> str:
        """What the job has printed."""
        self.details(job)
        return self._ask(self._client.get_job_logs, job)

    def stop(self, job: str) -> JobDetails:
        """Ask the job to save and end, and wait until it has; what became of it."""
        self.details(job)
        self._ask(self._client.stop_job, job)
        while not (found := self.details(job)).status.is_terminal():
            time.sleep(_POLL_SECONDS)
        return found

    def follow(self, job: str, show: Callable[[str], None]) -> JobDetails:
        """Show all that the job prints, from its beginning, until it has ended; what became of it. A connection that is
        lost is made anew."""
        tail, is_lost = _Tail(self._client, job, show), False
        while True:
            try:
                asyncio.run(tail.read())
                found = self.details(job)
                if found.status.is_terminal():
                    return found
                is_lost = False
            except (OSError, TimeoutError, aiohttp.ClientError, RuntimeError):  # requests' own are OSErrors
                if not is_lost:
                    show("[the cluster does not answer; trying again]\n")
                is_lost = True
            time.sleep(_POLL_SECONDS)

    def _ask(self, call: Callable[..., Any], *job: str) -> Any:
        try:
            return call(*job)
        except RuntimeError as error:  # Ray's word for every answer but a good one
            if job and "status code 404" in str(error):
                raise UserError(f"the cluster at {self.address} knows no job {job[0]}; see `cuboid jobs`") from error
            raise RunFailed(f"the cluster at {self.address} refuses: {_first_line(error)}") from error
        except requests.RequestException as error:
            raise RunFailed(f"the cluster at {self.address} does not answer: {_first_line(error)}") from error


class _Tail:
    """A job's log, shown once however often it is read from its beginning."""

    def __init__(self, client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> None:
        self._client, self._job, self._show = client, job, show
        self._shown = 0

    async def read(self) -> None:
        seen, parts = 0, aiter(self._client.tail_job_logs(self._job))
        while True:
            try:
                async with asyncio.timeout(_SILENCE_SECONDS):  # wait_for may swallow a Ctrl-C as a line comes in
                    part = await anext(parts)
            except (StopAsyncIteration, TimeoutError):
                return
            new = part[max(0, self._shown - seen) :]
            seen += len(part)
            if new:
                self._show(new)
                self._shown = seen


def exit_code(job: JobDetails) -> int:
    """Of the command that follows a job: the job's own."""
    if job.status == JobStatus.STOPPED:
        return STOPPED["signal"]
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.driver_exit_code or 1


def why_not_begun(job: JobDetails) -> str:
    """Ray's words for a job that failed before its command ran; empty where it did run."""
    return "" if job.driver_exit_code is not None or job.status != JobStatus.FAILED else str(job.message or "")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
