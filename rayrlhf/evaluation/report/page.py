"""The data structure in the page: one file, its style, scripts and data inside it, and no way out of it.

Text from the run never becomes markup: the data are JSON in a block that the browser does not run, `<` escaped, and the
scripts write it with textContent. A content security policy allows the page's own script and style by their hash and
nothing else, no network included: should a text find a way into the markup all the same, it stays text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from rayrlhf.errors import ConfigError
from rayrlhf.evaluation.report.folder import read_folder
from rayrlhf.evaluation.report.structure import structure

__all__ = ["render", "write_report"]

POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
STYLES = ("base.css", "plots.css", "tables.css")
SCRIPTS = (
    *("dom.js", "format.js", "state.js", "axes.js", "lineplot.js", "stacked.js", "paths.js", "spread.js"),
    *("overview.js", "config.js", "training.js", "tokens.js", "table.js", "answers.js", "findings.js", "main.js"),
)


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of a run, or of several beside each other.

    Args:
        runs: folders of runs.
        output: the file; without it `report.html` in the run's folder, or `comparison.html` in the first of several.

    Returns:
        The file.

    Raises:
        DataError: a folder is no run's.
        ConfigError: no run is named, or the file cannot be written there.
    """
    if not runs:
        raise ConfigError("report: no run is named", "name a folder that `rayrlhf run` wrote, such as runs/demo")
    html = render(structure([read_folder(Path(run)) for run in runs]))
    target = output or Path(runs[0]) / ("report.html" if len(runs) == 1 else "comparison.html")
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_text(html, encoding="utf-8")
        aside.replace(target)  # whoever has the earlier report open never sees half of this one
    except OSError as error:
        raise ConfigError(f"{target}: cannot write the report: {error.strerror}", "name another --output") from None
    return target


def render(data: Mapping[str, Any]) -> str:
    """The page of a data structure."""
    style = "\n".join(_static(name) for name in STYLES)
    script = '(() => {\n"use strict";\n' + "\n".join(_static(name) for name in SCRIPTS) + "\n})();"
    readings = [escape(f"{run['name']}: {run['reading']}") for run in data["runs"]]
    return Template(_static("template.html")).substitute(
        title=escape(data["title"]),
        policy=f"{POLICY}; script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        style=style,
        script=script,
        data=_json(data),
        readings="".join(f"<p>{text}</p>" for text in readings),
    )


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the block it stands in, whatever a response says."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone surrogate is legal in JSON and not in UTF-8.
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}"


def _static(name: str) -> str:
    return (files("rayrlhf.evaluation.report") / "static" / name).read_text(encoding="utf-8")
