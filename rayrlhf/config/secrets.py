"""Tokens, keys and passwords stay out of configs: a config is written to the run's folder, its report and its tracker.

What looks like one is refused before anything repeats it; `masked` is for texts that others wrote, such as errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from rayrlhf.config.limits import leaves
from rayrlhf.errors import ConfigError

__all__ = ["VARIABLE", "masked", "refuse_secrets"]

HINT = (
    "take it out: configs are shown in logs and reports. Secrets are read from the environment (HF_TOKEN, "
    "WANDB_API_KEY, the variable that ppo.reward.token_variable names)"
)
# What a text may hold, by how a message calls it. The second group of each is the secret.
KINDS = {
    "a URL with a password": re.compile(r"(://[^/\s:@]*:)([^/\s]+)(?=@)"),
    "a URL with a token for a name": re.compile(r"(://)([^/\s:@]{16,})(?=@)"),
    "a token in a URL": re.compile(
        r"([?&](?:[\w.-]*(?:token|secret|passw(?:or)?d|signature|api[_-]?key|access[_-]?key)|(?:[\w.-]*[._-])?(?:key|sig)|"
        r"auth|code)=)([^&\s#'\"]+)",
        re.I,
    ),
    "an authorization header": re.compile(r"(\b(?:bearer|authorization:\s*basic)\s+)([A-Za-z0-9._~+/-]{16,}=*)", re.I),
    "a private key": re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)([^-]+)"),
    "what looks like an access token": re.compile(
        r"(?<![A-Za-z0-9])()(hf_[A-Za-z0-9]{30,}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|"
        r"github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|"
        r"wandb_v1_[A-Za-z0-9_]{20,}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+)(?![A-Za-z0-9])"
    ),
}
KEY = re.compile(
    r"(^|[_-])(token|secrets?|passwords?|passwd|auth|api_?keys?|access_?keys?|private_?keys?|credentials?)$|^key$", re.I
)
VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(^|_)(PASS|AUTH|PAT)|_KEY|^(API|ACCESS)KEY)$")
"""Names of variables whose values are secrets. `ppo.reward.token_variable` has to be one."""
SHORTEST = 8
"""Of a variable's value: `changeme` may be a secret, `1` is not."""


def refuse_secrets(
    tree: Mapping[str, Any], environ: Mapping[str, str] = os.environ, source: str = "the config"
) -> None:
    """Raise ConfigError for a value that holds a secret, or stands where one would; it names the key alone."""
    held = _of_environment(environ)
    for dotted, key, value in leaves(tree):
        found = _kind_of(value, held) if isinstance(value, str) else None
        if found is None and KEY.search(key) and isinstance(value, str) and value:
            found = "a value where a secret would stand"
        if found:
            raise ConfigError(f"{source}: {masked(dotted, held)}: holds {found}", HINT)


def masked(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with *** in the place of each secret that can be told by its looks, or is in the environment."""
    for value in sorted(_of_environment(environ).values(), key=len, reverse=True):
        text = text.replace(value, "***")
    for pattern in KINDS.values():
        text = pattern.sub(r"\1***", text)
    return text


def _kind_of(text: str, held: Mapping[str, str]) -> str | None:
    for variable, value in held.items():
        if value in text:
            return f"the value of the environment's {variable}"
    return next((kind for kind, pattern in KINDS.items() if pattern.search(text)), None)


def _of_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that hold secrets, by their names."""
    return {name: value for name, value in environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST}
