"""Every choice of a calibration run, in groups, and the presets that name all of them (method section 3)."""

from ptq_tdq.config.config import PRESETS, Config, preset, read_config_file
from ptq_tdq.config.groups import Role

__all__ = ["PRESETS", "Config", "Role", "preset", "read_config_file"]
