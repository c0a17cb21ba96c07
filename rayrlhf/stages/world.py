"""A world's files in place of the user's."""

from __future__ import annotations

from rayrlhf.config import Config
from rayrlhf.worlds.base import create_world
from rayrlhf.worlds.files import write_world

__all__ = ["with_world"]


def with_world(config: Config) -> Config:
    """Write the files of `world.name` and name them in every key of `data` that is empty; unchanged without a world."""
    if config.world.name is None:
        return config
    world = create_world(config.world.name, config.world.module)
    parts = (
        config.world.name,
        str(config.world.seed),
        *(() if config.world.size == 1 else (f"{config.world.size:g}",)),
    )
    folder = (config.run.output / "worlds" / "-".join(parts)).resolve()
    files = write_world(world, folder, config.world.seed, config.world.size)
    tree = config.model_dump(mode="json")
    tree["data"] |= {kind: [str(path)] for kind, path in files.items() if not tree["data"][kind]}
    return Config.model_validate(tree)
