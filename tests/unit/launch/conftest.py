"""What `rayrlhf manifests` renders, of the example and of values that ask for everything."""

from __future__ import annotations

import pytest

from rayrlhf.launch.manifests import load_values, render
from tests.unit.launch.made_values import EXAMPLE, values

GPU_GROUP = {"gpus": 8, "cpus": 96, "memory_gib": 768, "resources": {"fast_disk": 1}, "node_selector": {"pool": "a100"}}


@pytest.fixture(scope="session")
def example() -> dict[str, str]:
    return render(*load_values(EXAMPLE))


@pytest.fixture(scope="session")
def mixed() -> dict[str, str]:
    """GPU and CPU groups, everything that can be asked for."""
    made = values(
        workers={"gpu": GPU_GROUP | {"nodes": 2, "most": 4}, "cpu": {"nodes": 1}},
        images={
            "gpu": "registry.example/rlhf:gpu",
            "cpu": "registry.example/rlhf:cpu",
            "packages": ["boto3==1.40.0"],
            "pull_secrets": ["registry"],
        },
        storage={"path": "/mnt/runs", "claim": "runs", "storage_class": "nfs"},
        slurm={"group": "gpu", "partition": "a100", "account": "me", "options": ["--qos=high"], "setup": ["true"]},
        launcher={"provider": {"type": "aws", "region": "us-west-2"}, "ssh_private_key": "~/.ssh/key"},
    )
    return render(made, None)
