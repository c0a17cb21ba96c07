"""The configuration: a file per section, `root.py` joins them, `load.py` reads YAML and overrides. No torch here."""

from rayrlhf.config.load import DATA_ROOT_VARIABLE, config_from, dump_config, load_config, load_section
from rayrlhf.config.root import Config, check_context

__all__ = ["DATA_ROOT_VARIABLE", "Config", "check_context", "config_from", "dump_config", "load_config", "load_section"]
