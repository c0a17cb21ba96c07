"""Names in the rendered files come back as they were given, whatever YAML would take them for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayrlhf.launch.manifests import render
from tests.unit.launch.made_values import values

# What YAML 1.1, which Ray, PyYAML and Go's readers follow, takes for a boolean or for nothing unless it is quoted.
NO_NAMES = ("no", "on", "null", "true", "y")


def strings_and_keys(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(tree, dict):
                assert isinstance(key, str), tree
                yield key
            yield from strings_and_keys(value)
    elif isinstance(tree, str):
        yield tree


@pytest.mark.parametrize("word", NO_NAMES)
def test_names_that_yaml_would_take_for_something_else_come_back_as_they_were_given(word: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: {name: x}\n")
    made = values(
        name=word,
        config=tmp_path / "run.yaml",
        workers={word: {"nodes": 1, "node_selector": {word: word}, "resources": {word: 1}}},
        images={"gpu": word, "cpu": word, "pull_secrets": [word]},
        storage={"claim": word, "storage_class": word},
        kubernetes={"namespace": word, "auth_secret": word, "env_secrets": [word]},
        launcher={"ssh_user": word, "provider": {"type": "aws", "region": word}},
    )
    files = {name: yaml.safe_load(text) for name, text in render(made, None).items() if name.endswith(".yaml")}
    for name, tree in files.items():
        found = list(strings_and_keys(tree))  # and every key is a string
        assert word in found or name in ("prometheus.yaml", "config.yaml")
    cluster = files["raycluster.yaml"]
    assert cluster["metadata"] == {"name": word, "namespace": word}
    assert files["rayjob.yaml"]["spec"]["rayClusterSpec"] == cluster["spec"]
    assert cluster["spec"]["authOptions"]["secretName"] == word
    [group] = cluster["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    assert (group["groupName"], pod["imagePullSecrets"], pod["nodeSelector"]) == (word, [{"name": word}], {word: word})
    assert pod["containers"][0]["image"] == word
    assert pod["containers"][0]["envFrom"][0]["secretRef"]["name"] == word
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == word
    assert files["storage.yaml"]["metadata"] == {"name": word, "namespace": word}
    assert files["storage.yaml"]["spec"]["storageClassName"] == word
    assert files["config.yaml"]["metadata"] == {"name": f"{word}-config", "namespace": word}
    assert files["podmonitor.yaml"]["metadata"] == {"name": word, "namespace": word}
    launcher = files["ray-launcher.yaml"]
    assert (launcher["cluster_name"], launcher["auth"]["ssh_user"]) == (word, word)
    assert list(launcher["available_node_types"]) == ["head", word]
