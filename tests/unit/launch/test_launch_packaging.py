"""What a job is sent, and what not."""

from __future__ import annotations

import errno
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

import rayrlhf
from rayrlhf.errors import ConfigError
from rayrlhf.launch.packaging import collect_package, write_zip


def write(folder: Path, *names: str, size: int = 1) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def names(folder: Path, config: str = "mine.yaml") -> set[str]:
    files = collect_package(folder, folder / config).files
    return {name for name in files if not name.startswith("rayrlhf/")}


def test_what_tools_and_runs_leave_and_where_secrets_lie_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "code/world.py", "data/prompts.jsonl")
    write(tmp_path, ".git/config", ".venv/bin/python", "code/__pycache__/world.pyc", "runs/mine/metrics.jsonl")
    write(tmp_path, ".env", "code/.env.local", "code/server.pem", ".netrc", ".ssh/config", "id_ed25519")
    assert names(tmp_path) == {"mine.yaml", "code/world.py", "data/prompts.jsonl"}


def test_other_places_of_secrets_are_left_out_as_well(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", ".envrc", ".git-credentials", ".pypirc", "id_ecdsa", "id_rsa.pub", "store.p12")
    write(tmp_path, ".kube/config", ".docker/config.json", ".gnupg/key", ".ray/auth_token", ".cache/huggingface/token")
    write(tmp_path, ".config/gcloud/credentials.db", ".azure/token", "kaggle.json", "code/.config/app.yaml")
    assert names(tmp_path) == {"mine.yaml", "code/.config/app.yaml"}


def test_a_link_does_not_bring_in_what_is_left_out_by_its_own_name(tmp_path: Path) -> None:
    write(tmp_path / "home", ".env", ".ssh/config", "shared.txt")
    write(tmp_path / "mine", "mine.yaml", "server.pem")
    for name, target in (("settings", "../home/.env"), ("hosts", "../home/.ssh/config"), ("cert", "server.pem")):
        (tmp_path / "mine" / name).symlink_to(target)
    (tmp_path / "mine" / "notes").symlink_to("../home/shared.txt")
    assert names(tmp_path / "mine") == {"mine.yaml", "notes"}


def test_a_worktrees_git_file_is_left_out_too(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", ".git")
    assert names(tmp_path) == {"mine.yaml"}


def test_ignore_files_hold_for_their_folder_and_below(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "a/big.bin", "a/kept.txt", "b/big.bin", "b/c/notes.txt", "notes.txt", "c/kept.bin")
    (tmp_path / ".gitignore").write_text("# models\na/*.bin\n/notes.txt\n")
    (tmp_path / "b" / ".rayignore").write_text("*.bin\nc/\n")
    ignore = {".gitignore", "b/.rayignore"}
    assert names(tmp_path) - ignore == {"mine.yaml", "a/kept.txt", "c/kept.bin"}


def test_the_nearest_ignore_file_has_the_last_word_as_in_git(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "a.log", "kept/a.log", "kept/deep/b.log", "kept/deep/c.log", "models/tiny.bin")
    write(tmp_path, "out/a.log")
    (tmp_path / ".gitignore").write_text("*.log\nmodels/*\nout/\n")
    (tmp_path / "kept" / ".gitignore").write_text("!*.log\n")
    (tmp_path / "kept" / "deep" / ".gitignore").write_text("c.log\n")
    (tmp_path / "out" / ".gitignore").write_text("!*.log\n")  # nobody looks into a folder that is left out
    (tmp_path / ".rayignore").write_text("!models/tiny.bin\n")
    expected = {"mine.yaml", "kept/a.log", "kept/deep/b.log", "models/tiny.bin"}
    assert {name for name in names(tmp_path) if "ignore" not in name} == expected


def test_git_and_we_leave_out_the_same(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "a.log", "kept/a.log", "kept/deep/b.log", "kept/deep/c.log", "out/a.log", "a b/x.tmp")
    (tmp_path / ".gitignore").write_text("*.log\nout/\n*.tmp\n!x.tmp\n")
    (tmp_path / "kept" / ".gitignore").write_text("!*.log\n")
    (tmp_path / "kept" / "deep" / ".gitignore").write_text("/c.log\n")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    listed = subprocess.check_output([*git, "ls-files", "-z", "--others", "--exclude-standard"], text=True)
    assert names(tmp_path) == set(listed.split("\0")) - {""}


def test_what_is_left_out_always_cannot_be_brought_in_again(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", ".env", "server.pem")
    (tmp_path / ".rayignore").write_text("!.env\n!*.pem\n")
    assert names(tmp_path) == {"mine.yaml", ".rayignore"}


def test_a_secrets_name_is_known_in_capitals_too(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "server.PEM", "Deploy.Key", ".ENV", "ID_RSA", ".SSH/config", "Runs/notes.txt")
    write(tmp_path, "credentials.json", "client_secret_12.json", "Service_Account.json", "mine.ppk")
    write(tmp_path, "keys.json", "credentials_test.py", "keyboard.py", "environment.yaml")
    assert names(tmp_path) == {
        "mine.yaml",
        "keys.json",
        "credentials_test.py",
        "keyboard.py",
        "environment.yaml",
        "Runs/notes.txt",
    }


def test_links_to_folders_are_not_followed_and_broken_ones_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "data.bin")
    write(tmp_path / "mine", "mine.yaml")
    (tmp_path / "mine" / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "mine" / "ignored").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "code").mkdir()
    (tmp_path / "mine" / "code" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / ".rayignore").write_text("ignored\n")
    assert names(tmp_path / "mine") == {"mine.yaml", ".rayignore"}
    package = collect_package(tmp_path / "mine", tmp_path / "mine" / "mine.yaml")
    assert package.links == ("code/more", "data")  # whoever submits is told


def test_a_config_that_is_ignored_or_lies_elsewhere_is_sent_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, "mine/runs/mine.yaml", "other/other.yaml")
    inside = collect_package(tmp_path / "mine", tmp_path / "mine" / "runs" / "mine.yaml")
    assert inside.config == "runs/mine.yaml"
    assert inside.config in inside.files
    outside = collect_package(tmp_path / "mine", tmp_path / "other" / "other.yaml")
    assert outside.config == ".rayrlhf/other.yaml"
    assert outside.files[outside.config] == tmp_path / "other" / "other.yaml"


def test_the_package_that_checked_the_config_is_the_one_that_is_sent(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "rayrlhf/__init__.py", "rayrlhf/old.py")
    files = collect_package(tmp_path, tmp_path / "mine.yaml").files
    own = Path(rayrlhf.__file__).parent
    assert files["rayrlhf/__init__.py"] == own / "__init__.py"
    assert files["rayrlhf/launch/supported.toml"] == own / "launch" / "supported.toml"
    assert "rayrlhf/old.py" not in files


def test_a_package_that_is_too_large_names_the_folders_that_are(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml")
    write(tmp_path, "data/text/a.bin", "data/text/deep/b.bin", size=2 * 2**20)
    write(tmp_path, "notes.bin", size=2**20)
    with pytest.raises(ConfigError) as error:
        collect_package(tmp_path, tmp_path / "mine.yaml", limit_mib=3)
    assert "MiB would be sent to every node, 3 at most: data/text/ 4.0 MiB, " in error.value.message
    assert "notes.bin 1.0 MiB" in error.value.message
    assert ".rayignore" in error.value.hint


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--working-dir .*nowhere: no such folder"):
        collect_package(tmp_path / "nowhere", tmp_path / "mine.yaml")


def test_the_same_files_give_the_same_archive_whenever_they_were_written(tmp_path: Path) -> None:
    archives = []
    for copy in ("one", "two"):
        write(tmp_path / copy, "mine.yaml", "code/world.py")
        (tmp_path / copy / "run.sh").write_text("true")
        (tmp_path / copy / "run.sh").chmod(0o755)
        archives.append(tmp_path / f"{copy}.zip")
        write_zip(collect_package(tmp_path / copy, tmp_path / copy / "mine.yaml"), archives[-1])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.read("mine.yaml") == b"x"  # at the top: it is the job's folder
        assert archive.getinfo("run.sh").external_attr >> 16 == 0o755


# What cannot be read, or not be sent.


def refused(folder: Path) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        write_zip(collect_package(folder, folder / "mine.yaml"), folder.parent / "package.zip")
    return error.value


@pytest.mark.parametrize("text", ["données/\n".encode("latin-1"), "*.pem\n".encode("utf-16")])
def test_an_ignore_file_that_is_not_utf8_is_named(tmp_path: Path, text: bytes) -> None:
    """Whoever reads it wrong sends what it leaves out."""
    write(tmp_path, "mine.yaml")
    (tmp_path / ".gitignore").write_bytes(text)
    error = refused(tmp_path)
    assert error.message == f"{tmp_path / '.gitignore'}: not UTF-8 text: what it leaves out is not known"
    assert error.hint == "save it as UTF-8"


def test_a_byte_order_mark_is_no_part_of_the_first_pattern(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "notes.txt")
    (tmp_path / ".gitignore").write_text("notes.txt\n", encoding="utf-8-sig")
    assert names(tmp_path) == {"mine.yaml", ".gitignore"}


@pytest.mark.parametrize("line", ["!", "/", "[z-a]*"])
def test_a_line_that_is_no_pattern_is_told_by_its_number_or_matches_nothing(tmp_path: Path, line: str) -> None:
    write(tmp_path, "mine.yaml", "code/a.py")
    (tmp_path / "code" / ".rayignore").write_text(f"# mine\n{line}\n")
    if line == "/":
        assert names(tmp_path) == {"mine.yaml", "code/a.py", "code/.rayignore"}
        return
    error = refused(tmp_path)
    assert error.message == f"{tmp_path}/code/.rayignore:2: {line!r} is no pattern"
    assert "take the line out" in error.hint


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    error = refused(tmp_path)
    assert error.message == f"{tmp_path}/caf\\udce9.txt: its name is not UTF-8, which a package's names are"
    assert ".rayignore" in error.hint
    (tmp_path / ".rayignore").write_text("caf?.txt\n")  # as the hint says
    assert names(tmp_path) == {"mine.yaml", ".rayignore"}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "mine.yaml", "code/closed.bin")
    closed, read_bytes = tmp_path / "code" / "closed.bin", Path.read_bytes

    def read(path: Path) -> bytes:
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)  # whoever runs tests as root may read all
    error = refused(tmp_path)
    assert error.message == f"{closed}: cannot be read (Permission denied)"
    assert ".rayignore" in error.hint


def test_a_file_that_goes_meanwhile_is_named(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "new.bin")
    package = collect_package(tmp_path, tmp_path / "mine.yaml")
    (tmp_path / "new.bin").unlink()
    with pytest.raises(ConfigError, match=r"new\.bin: cannot be read \(No such file or directory\)"):
        write_zip(package, tmp_path / "package.zip")
