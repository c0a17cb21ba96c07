"""What a job is sent: the files of a folder that are not ignored, this package itself, and the config, in one zip."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ray._private.thirdparty.pathspec import PathSpec  # git's rules for .gitignore, as Ray itself reads them

from rayrlhf.errors import ConfigError

__all__ = ["IGNORED", "IGNORE_FILES", "LIMIT_MIB", "Package", "collect_package", "write_zip"]

# Every node fetches the package from the head's memory and unpacks it; data and models belong on shared storage.
LIMIT_MIB = 100
MIB = 2**20
IGNORE_FILES = (".gitignore", ".rayignore")
# Where secrets lie, in small letters: names are compared whatever their letters.
SECRET = (
    *(".env", ".env.*", ".envrc", ".netrc", ".git-credentials", ".pypirc", "kaggle.json"),
    *("credentials.json", "client_secret*.json", "service_account*.json"),
    *(".ssh/", ".aws/", ".azure/", ".config/gcloud/", ".kube/", ".docker/", ".gnupg/", ".ray/", ".cache/"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
)
IGNORED = (
    # what other tools leave
    *(".git", ".hg/", ".svn/", ".venv/", "venv/", "node_modules/", "__pycache__/", "*.pyc", "*.egg-info/"),
    *(".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".import_linter_cache/", ".hypothesis/", ".ipynb_checkpoints/"),
    # what runs leave
    *("runs/", "wandb/"),
)


# Each with the folder that its names start from; the top one first.
Rules = tuple[tuple[Path, PathSpec], ...]


@dataclass(frozen=True)
class Package:
    files: Mapping[str, Path]
    """Name in the package -> the file here."""
    config: str
    """The config's name in the package."""

    sizes: Mapping[str, int]
    """Bytes, by name."""

    links: tuple[str, ...] = ()
    """To folders, which are not followed: what they would be called in the package."""

    @property
    def mib(self) -> float:
        return sum(self.sizes.values()) / MIB


def collect_package(folder: Path, config: Path, limit_mib: float = LIMIT_MIB) -> Package:
    """All that the job is sent of `folder`, with `rayrlhf` as it runs here and the config, wherever that lies.

    Raises:
        ConfigError: there is no such folder, or it holds more than `limit_mib`; the largest folders are named.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder}: no such folder")
    folder, config = folder.resolve(), config.resolve()
    own = Path(__file__).parents[1]
    # The code that has checked the config is the code that runs it, whatever the nodes have installed.
    found, links = _files(folder, "")
    files = {name: path for name, path in found.items() if not name.startswith("rayrlhf/")}
    name = config.relative_to(folder).as_posix() if config.is_relative_to(folder) else f".rayrlhf/{config.name}"
    files |= _files(own, "rayrlhf/")[0] | {name: config}
    package = Package(files, name, {name: path.stat().st_size for name, path in files.items()}, links)
    if package.mib > limit_mib:
        raise ConfigError(
            f"{folder}: {package.mib:.0f} MiB would be sent to every node, {limit_mib:g} at most: {_largest(package)}",
            "list in .rayignore (as in a .gitignore) what the job does not need; put data and models on storage that "
            "every node sees and name them in the config; or give --working-dir a smaller folder",
        )
    return package


def write_zip(package: Package, target: Path) -> None:
    """The same files give the same bytes, which a cluster that has them is not sent again.

    Raises:
        ConfigError: a file cannot be read.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(package.files.items()):
            try:
                mode, data = path.stat().st_mode, path.read_bytes()
            except OSError as error:
                raise _unreadable(error) from None
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (mode & 0o777) << 16
            archive.writestr(entry, data)


def _files(folder: Path, prefix: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files below it by their names in the package; the names of links to folders."""
    try:
        found = {prefix + path.relative_to(folder).as_posix(): path for path in _walk(folder)}
        links = tuple(name for name, path in found.items() if path.is_dir())
    except OSError as error:
        raise _unreadable(error) from None
    for name, path in found.items():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{path}: its name is not UTF-8, which a package's names are",
                "rename it, or list it in .rayignore (a ? stands for each such byte)",
            ) from None
    return {name: path for name, path in found.items() if name not in links}, links


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(
        f"{error.filename}: cannot be read ({error.strerror})",
        "list it in .rayignore, or give --working-dir the folder of the job alone",
    )


def _walk(folder: Path, rules: Rules = (), top: Path | None = None) -> Iterator[Path]:
    """Files that no rule ignores, and links to folders, which are not followed."""
    top = top or folder
    rules = (*rules, *_rules_of(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if _is_left_out(path.relative_to(top).as_posix() + "/" * entry.is_dir()) or _is_ignored(path, entry, rules):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, rules, top)
        elif entry.is_dir() or (entry.is_file() and not (entry.is_symlink() and _is_secret(path.resolve(), top))):
            yield path


def _is_left_out(name: str) -> bool:
    """Whatever ignore files say."""
    return bool(_known(IGNORED).match_file(name) or _known(SECRET).match_file(name.lower()))


def _is_secret(target: Path, folder: Path) -> bool:
    """Whether what a link leads to is left out by its own name, wherever it lies: a link to a .env is one."""
    name = target.relative_to(folder) if target.is_relative_to(folder) else target
    return bool(_known(SECRET).match_file(name.as_posix().lstrip("/").lower()))


def _is_ignored(path: Path, entry: os.DirEntry[str], rules: Rules) -> bool:
    """The last pattern that matches decides, and those of the nearest folder come last."""
    ignored = False
    for start, spec in rules:
        name = path.relative_to(start).as_posix() + "/" * entry.is_dir()
        for pattern in spec.patterns:
            if pattern.include is not None and any(True for _ in pattern.match((name,))):
                ignored = pattern.include
    return ignored


def _rules_of(folder: Path) -> Iterator[tuple[Path, PathSpec]]:
    for name in IGNORE_FILES:
        if (folder / name).is_file():
            yield folder, _read_spec(folder / name)


def _read_spec(path: Path) -> PathSpec:
    """Of a file that is there. What cannot be understood is refused: it may name what must not be sent."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text: what it leaves out is not known", "save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        try:
            _spec([line])
        except (ValueError, IndexError, re.error):
            raise ConfigError(f"{path}:{number}: {line!r} is no pattern", "take the line out, or mend it") from None
    return _spec(lines)


@cache
def _known(lines: tuple[str, ...]) -> PathSpec:
    return _spec(lines)


def _spec(lines: Iterable[str]) -> PathSpec:
    return PathSpec.from_lines("gitwildmatch", lines)


def _largest(package: Package) -> str:
    """The five heaviest among the folders, two levels deep, and files at the top."""
    sizes: Counter[str] = Counter()
    for name, size in package.sizes.items():
        parts = name.split("/")
        sizes["/".join(parts[:-1][:2]) + "/" if len(parts) > 1 else name] += size
    return ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in sizes.most_common(5))
