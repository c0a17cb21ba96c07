"""What to do when a Ray cluster refuses the token that it is given. No torch: the client of Ray's jobs says it too."""

from __future__ import annotations

import os
from pathlib import Path

from ray.exceptions import AuthenticationError

__all__ = ["refusal", "token_hint"]

FILE = "~/.ray/auth_token"
GIVE = f"in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in {FILE}"
# How Ray's head answers; of a driver that joins it, only the text of a cause tells.
REFUSED = "InvalidAuthToken"


def refusal(error: BaseException | None) -> str | None:
    """What Ray says of the token, where this error, or what caused it, is about that."""
    while error is not None:
        if isinstance(error, AuthenticationError):
            return str(error).split(". ")[0].splitlines()[0]
        if REFUSED in str(error):
            return "the authentication token is missing or incorrect"
        error = error.__cause__ or error.__context__
    return None


def token_hint() -> str:
    """What is set here, and what has to be."""
    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    if mode.lower() != "token":
        return (
            f"RAY_AUTH_MODE is {mode} here and `token` on the cluster: set RAY_AUTH_MODE=token, and give the cluster's "
            f"token {GIVE}"
        )
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    if not named and not Path(FILE).expanduser().exists():
        return f"RAY_AUTH_MODE is token, and there is none here: give the cluster's {GIVE}"
    return f"the token here is that of {(named or [FILE])[0]}: it has to be the one that the cluster was started with"
