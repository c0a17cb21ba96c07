"""Ray's job server, spoken to over HTTP alone: no Ray runs here, requests have deadlines, errors say what to do.

The server is the cluster's dashboard (`http://HEAD:8265`). With RAY_AUTH_MODE=token it asks for the cluster's token.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from rayrlhf.actors.ray_token import token_hint
from rayrlhf.errors import ConfigError, ResourceError

__all__ = ["LOST", "Jobs", "RequestFailed", "connect"]

REQUEST_S = 60.0
# Ray takes these before any argument, also where somebody has named another cluster by hand.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class RequestFailed(RuntimeError):
    """The job server answered, with a status that is not 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text.strip()[-500:]}")
        self.status = status


# What a connection that is lost for a while may raise: Ray's tail says RuntimeError of a socket that closed.
LOST = (OSError, TimeoutError, aiohttp.ClientError, RuntimeError)


class Jobs(JobSubmissionClient):  # type: ignore[misc]  # Ray is not followed
    """Ray's client, which waits for ever by itself and puts all that fails into a RuntimeError."""

    def _do_request(self, method: str, endpoint: str, **settings: Any) -> requests.Response:
        answer: requests.Response = super()._do_request(method, endpoint, **{"timeout": REQUEST_S, **settings})
        return answer

    def _raise_error(self, r: requests.Response) -> None:
        raise RequestFailed(r.status_code, r.text)

    def find(self, job: str) -> JobDetails:
        """A job that was submitted.

        Raises:
            ConfigError: the cluster knows none of that name; names the nearest.
        """
        if job in ("", ".", "..") or set(job) & set("/?#%"):  # another address than a job's
            raise ConfigError(f"{job!r}: no name of a job", self._nearest(job))
        try:
            found = self.get_job_info(job)
        except RequestFailed as error:
            if error.status != 404:
                raise
            raise ConfigError(f"{job}: this cluster knows no such job", self._nearest(job)) from None
        if found.submission_id is None:
            raise ConfigError(f"{job}: a program that joined the cluster, not a job that was submitted")
        return found

    def _nearest(self, job: str) -> str:
        known = sorted((d for d in self.list_jobs() if d.submission_id), key=lambda d: d.start_time or 0, reverse=True)
        names = [details.submission_id for details in known]
        near = difflib.get_close_matches(job, names, n=1, cutoff=0.5)
        if near:
            return f"did you mean {near[0]}?"
        newest = ", ".join(names[:5])
        return f"the newest are {newest}" if names else "no job was submitted to it since it started"


@contextmanager
def connect(address: str) -> Iterator[Jobs]:
    """The cluster's job server, checked with one request; its errors become ours.

    Raises:
        ConfigError: not an address of a dashboard.
        ResourceError: nobody answers, or the token is not the cluster's.
    """
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # progress of uploads; the console is the user's
    address = address if "://" in address else f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: not HTTP", "give the head's dashboard, for example http://HEAD:8265")
    try:
        yield _client(address)
    except AuthenticationError as error:
        raise ResourceError(f"--address {address}: {str(error).splitlines()[0]}", token_hint()) from None
    except requests.exceptions.RequestException as error:
        raise _unreachable(address, error) from None
    except ConnectionError as error:  # Ray's own, of the first request
        raise _unreachable(address, error) from None
    except RequestFailed as error:
        raise ResourceError(
            f"--address {address}: the job server failed ({error})", "look at the head's logs"
        ) from None


def _client(address: str) -> Jobs:
    before = {name: os.environ.pop(name, None) for name in ADDRESS_VARIABLES}
    try:
        return Jobs(address)
    except RuntimeError as error:  # somebody answers, but not as a dashboard does
        raise _unreachable(address, error) from None
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _unreachable(address: str, error: Exception) -> ResourceError:
    return ResourceError(
        f"--address {address}: no Ray job server answers ({str(error).splitlines()[0]})",
        "give the head's dashboard, http://HEAD:8265. It listens on the head's loopback alone unless `ray start` was "
        "given --dashboard-host; a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD) reaches it there",
    )
