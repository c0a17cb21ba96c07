"""What docs/rewards.md shows works: the function as a source, and the server answered by the client."""

from __future__ import annotations

import asyncio
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.rewards import RewardSourceConfig
from rayrlhf.rewards.base import RewardRequest
from rayrlhf.rewards.function import FunctionSource, load_function
from rayrlhf.rewards.http import HTTPSource
from rayrlhf.rewards.retry import Retries

PAGE = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
FUNCTION, SERVER = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
REQUESTS = [RewardRequest(i, (("user", "hello"),), text, True) for i, text in enumerate(["please", "a" * 20])]


def test_the_function_of_the_page_is_a_source_of_rewards(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(FUNCTION, encoding="utf-8")
    place = f"{tmp_path / 'rewards.py'}:short_and_polite"
    config = RewardSourceConfig.model_validate({"kind": "function", "function": place})
    source = FunctionSource(load_function(place), config, Retries.of(config, 0))
    assert asyncio.run(source.score(REQUESTS)) == pytest.approx([0.94, -0.2])


def test_the_server_of_the_page_is_one() -> None:
    code: dict[str, Any] = {"__name__": "page"}
    exec(SERVER, code)
    code["Rewards"].log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), code["Rewards"])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    config = RewardSourceConfig.model_validate({"kind": "http", "url": url, "batch": 1})

    async def run() -> Any:
        source = HTTPSource(config, None, Retries.of(config, 0))
        try:
            return await source.score(REQUESTS)
        finally:
            await source.close()

    assert asyncio.run(run()) == [0.94, 0.8]
    server.shutdown()


def test_the_table_of_the_page_has_the_defaults() -> None:
    rows = dict(re.findall(r"^\| (`[a-z_, `]+`) \| ([\d., ]+) \|", PAGE, flags=re.M))
    shown = {
        key: float(value)
        for keys, values in rows.items()
        for key, value in zip(re.findall(r"`(\w+)`", keys), values.split(","), strict=True)
    }
    fields = RewardSourceConfig.model_fields
    assert shown == {key: float(fields[key].default) for key in shown}
    assert len(shown) == 9
