"""A run's numbers at the endpoint that Prometheus scrapes, and the dashboard's names among them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rayrlhf.actors.exporter import RayMetrics
from rayrlhf.launch.dashboard import PANELS, node_label
from rayrlhf.metrics.names import prometheus_name
from tests.integration.conftest import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

# In a process of its own, as a run is: the gauges live as long as it does.
EXPORT = """\
import json, sys, time, urllib.request
import ray
from rayrlhf.actors.exporter import RayMetrics
from rayrlhf.metrics.sinks import RunSink
from pathlib import Path

sink = RunSink(Path(sys.argv[1]), [RayMetrics("demo", repeat_s=0.3)])
sink.write({"stage": "sft", "loss": 9.0})  # before Ray is there: a stage that was done before
ray.init(
    address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
    _system_config={"metrics_report_interval_ms": 1000},
)
metrics = json.loads(sys.argv[2])
sink.write({"stage": "reward", "step": 9})
sink.write({"stage": "ppo", "arm": "ppo_ptx", **dict.fromkeys(metrics, 1.0), "step": 1})
sink.write({"stage": "ppo", "arm": "ppo_ptx", "step": 2, "reward/mean": 1.5, "kl/mean": float("nan"), "text": "x"})
node = ray.nodes()[0]
url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
deadline, text = time.monotonic() + 80, ""
# Ray's own come from another process, at another time; and the agent forgets after a while what nobody says again.
while time.monotonic() < deadline and not (
    "ray_rayrlhf_step" in text and "ray_node_mem_used" in text and '="reward"' not in text
):
    time.sleep(0.3)
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        pass
sink.close()
print(text)
"""
# No GPU here; and what an object store says of itself comes with the first objects.
NOT_HERE = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_object_store_memory"}


def test_every_number_of_a_record_is_a_gauge_that_prometheus_can_scrape(tmp_path: Path) -> None:
    asked = [metric for panels in PANELS.values() for p in panels if not p.nodes for metric in p.metrics]

    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path), json.dumps(asked)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    families = list(text_string_to_metric_families(done.stdout))  # Prometheus' own parser
    steps = [
        sample.labels["stage"] for family in families for sample in family.samples if sample.name.endswith("hf_step")
    ]
    assert steps == ["ppo"]  # the stages that are over are not there any more
    samples = {sample.name: sample for family in families for sample in family.samples}
    reward = samples["ray_rayrlhf_reward_mean"]
    assert {tag: reward.labels[tag] for tag in RayMetrics.TAGS} == {"run": "demo", "stage": "ppo", "arm": "ppo_ptx"}
    assert (reward.value, samples["ray_rayrlhf_step"].value) == (1.5, 2.0)
    assert not {"ray_rayrlhf_kl_mean", "ray_rayrlhf_text"} & set(samples)  # no number, now
    assert {prometheus_name(metric) for metric in asked if metric != "kl/mean"} <= set(samples)
    nodes = {metric for panels in PANELS.values() for p in panels if p.nodes for metric in p.metrics}
    assert nodes - NOT_HERE <= set(samples)
    assert all(samples[name].labels[node_label(name)] for name in nodes - NOT_HERE)
    assert {family.name: family.type for family in families}["ray_rayrlhf_reward_mean"] == "gauge"
