"""What the GPU tests would start is taken by this version's config, and each asks for the GPUs that it says."""

from pathlib import Path

import pytest

from rayrlhf.actors.placement import check_resources
from rayrlhf.config.load import load_config
from rayrlhf.errors import ResourceError
from tests.gpu.whole_runs import RUNS, arguments

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", list(RUNS))
def test_a_gpu_run_is_a_valid_config_that_fits_on_its_gpus_and_on_no_fewer(name: str, tmp_path: Path) -> None:
    gpus = RUNS[name][0]
    config = load_config(ROOT / "configs" / "tiny.yaml", arguments(name, tmp_path))
    check_resources(config, [{"CPU": 16.0, "GPU": float(gpus)}])
    with pytest.raises(ResourceError, match="GPU"):
        check_resources(config, [{"CPU": 16.0, "GPU": gpus - 1.0}])
