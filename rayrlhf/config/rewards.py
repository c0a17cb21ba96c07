"""`ppo.reward`: who scores PPO's responses. See docs/rewards.md."""

from __future__ import annotations

import math
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from rayrlhf.config.base import NonNegative, NonNegativeInt, PathOrName, Positive, PositiveInt, Section, path_or_name
from rayrlhf.config.secrets import VARIABLE

__all__ = ["LOOPBACK", "RewardSourceConfig"]

Kind = Literal["model", "ensemble", "function", "http"]
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TEXT: tuple[Kind, ...] = ("function", "http")
# Which kinds read a key; all read one that is not here.
READ_BY: dict[str, tuple[Kind, ...]] = {
    "models": ("ensemble",),
    "how": ("ensemble",),
    "weight": ("ensemble",),
    "function": ("function",),
    "url": ("http",),
    "token_variable": ("http",),
    "concurrency": ("http",),
    "max_response_mib": ("http",),
    "breaker_failures": ("http",),
    "breaker_pause_s": ("http",),
    **dict.fromkeys(("batch", "timeout_s", "retries", "backoff_s", "max_wait_s"), TEXT),
}
# ... and what a kind cannot do without.
NEEDED: dict[Kind, str] = {"ensemble": "models", "function": "function", "http": "url"}
# What decides a reward; the rest says how long it is waited for, and may change within a run.
DECIDING = ("kind", "models", "how", "weight", "function", "url")


class RewardSourceConfig(Section):
    """A response whose reward fails (after `retries`), or is no finite number, is not trained on: it gets no 0."""

    kind: Kind = "model"
    """model: the reward model, made by the `reward` stage or named by `reward.path`. The others need none, and the
    `reward` stage is then left out: ensemble, several reward models; function, Python code; http, a service."""
    models: tuple[PathOrName, ...] = ()
    """ensemble: its reward models, Hugging Face names or folders. The value model starts from the first."""
    how: Literal["mean", "min", "uwo"] = "mean"
    """ensemble: mean, worst case, or mean - `weight` * variance (Coste et al. 2023, arXiv 2310.02743, section 3)."""
    weight: NonNegative = 0.1
    """ensemble: of the variance in uwo; the paper's for PPO."""
    function: str | None = None
    """function: `path/to/file.py:name` or `module:name`."""
    url: str | None = None
    """http: where batches of responses are POSTed to, https:// or http://."""
    token_variable: str | None = None
    """http: the environment variable (of the process that starts the run) that holds the bearer token. The token itself
    never stands in a config."""
    batch: PositiveInt = 32
    """function, http: responses scored by one call."""
    concurrency: PositiveInt = 4
    """http: requests under way at once, from each rank of the role."""
    timeout_s: Positive = 30.0
    """function, http: longest that one call may take."""
    retries: NonNegativeInt = 3
    """function, http: further calls after one that failed."""
    backoff_s: Positive = 0.5
    """function, http: waits before further calls are random, up to this much at first and twice as much each time."""
    max_wait_s: Positive = 30.0
    """function, http: longest of these waits. A service that asks for more (Retry-After) is not asked again."""
    max_response_mib: Positive = 1.0
    """http: an answer is read no further than this."""
    breaker_failures: PositiveInt = 5
    """http: after so many failures in a row the service is left alone ..."""
    breaker_pause_s: Positive = 30.0
    """... for so long, and then tried with one request."""

    @property
    def sees_text(self) -> bool:
        """Whether it scores the text of a response, and so needs no device."""
        return self.kind in TEXT

    def longest_s(self, responses: int) -> float:
        """Seconds that it may take to score so many, when every call fails as late as it can."""
        at_once = self.batch * (self.concurrency if self.kind == "http" else 1)
        return math.ceil(responses / at_once) * (self.retries + 1) * (self.timeout_s + self.max_wait_s)

    def deciding(self) -> dict[str, Any]:
        """The keys that decide what a reward is."""
        mine = [key for key in DECIDING if key not in READ_BY or self.kind in READ_BY[key]]
        return {key: value for key, value in self.model_dump(mode="json").items() if key in mine}

    @field_validator("function")
    @classmethod
    def _its_file_can_be_looked_up(cls, function: str | None) -> str | None:
        if function is not None:
            path_or_name(function.rpartition(":")[0])
        return function

    @model_validator(mode="after")
    def _keys_of_one_kind(self) -> RewardSourceConfig:
        for key, kinds in READ_BY.items():
            if self.kind not in kinds and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is for kind {' or '.join(kinds)}, and kind is {self.kind}: set one of the two otherwise"
                )
        needed = NEEDED.get(self.kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"kind {self.kind} needs {needed}")
        return self

    @model_validator(mode="after")
    def _function_has_a_place_and_a_name(self) -> RewardSourceConfig:
        if self.function is not None:
            place, _, name = self.function.rpartition(":")
            if not place or not name.isidentifier():
                raise ValueError(
                    f"function: found {self.function!r}; write path/to/file.py:name, or module:name of what can be "
                    "imported"
                )
        return self

    # Neither message repeats what it found: it may be a password or a token.
    @model_validator(mode="after")
    def _url_is_plain(self) -> RewardSourceConfig:
        if self.url is None:
            return self
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or parts.scheme not in ("http", "https") or parts.fragment:
            raise ValueError("url is not one of a service: write https://host/path, or http://host:port/path")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url holds a name or password, which would end up in logs: use token_variable")
        if self.token_variable and parts.scheme == "http" and host not in LOOPBACK:
            raise ValueError(
                f"url is http and token_variable is set: the token would travel to {host} unencrypted; take https (a "
                "service on this machine may be http)"
            )
        return self

    @model_validator(mode="after")
    def _token_is_named_not_given(self) -> RewardSourceConfig:
        if self.token_variable is None:
            return self
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.token_variable):
            raise ValueError(
                "token_variable is the name of an environment variable, in capitals, digits and _; the token itself "
                "stays out of the config"
            )
        if not VARIABLE.search(self.token_variable):
            raise ValueError(
                "token_variable: a name that ends with TOKEN or KEY is wanted, such as REWARD_TOKEN: its value is then "
                "known for a secret, and kept out of logs and reports"
            )
        return self
