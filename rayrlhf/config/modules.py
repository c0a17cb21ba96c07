"""Code of the user's own that a config names: an importable module, or the path of a .py file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from rayrlhf.errors import ConfigError

__all__ = ["import_named"]


def import_named(where: str, key: str, kind: str, cure: str) -> ModuleType:
    """The module `where`; that of a file is known as `rayrlhf_<kind>_<name of the file>`.

    Args:
        key: of the config, for errors.
        cure: where there is no such file.

    Raises:
        ConfigError: there is no such file, or the import raises.
    """
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}", cure)
    try:
        if path.suffix != ".py":
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(f"rayrlhf_{kind}_{path.stem}", path.resolve())
        assert spec is not None
        assert spec.loader is not None
        sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except Exception as error:  # somebody's own code: anything may go wrong in it
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}: {where} cannot be imported: {reason}", "mend it, or name another") from error
    return loaded
