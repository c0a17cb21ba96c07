"""A built-in world's files in place of the user's."""

from __future__ import annotations

from rayrlhf.config import Config
from rayrlhf.worlds.starter import write_starter

__all__ = ["with_world"]


def with_world(config: Config) -> Config:
    """Write the files of `world.name` and point `data` at them; unchanged where no world is named."""
    if config.world.name is None:
        return config
    folder = (config.run.output / "worlds" / f"{config.world.name}-{config.world.seed}").resolve()
    files = write_starter(folder, config.world.seed)
    tree = config.model_dump(mode="json")
    tree["data"] |= {"root": str(folder), **{kind: [path.name] for kind, path in files.items()}}
    tree["world"] = {}
    return Config.model_validate(tree)
