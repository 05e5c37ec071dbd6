"""Constants of a model: ``ModelConfig``, its presets, and a reader of ``config.json`` that guesses nothing."""

from kvcondense.config.model import ModelConfig, Yarn
from kvcondense.config.presets import PRESETS
from kvcondense.config.reader import config_of, json_of

__all__ = ["PRESETS", "ModelConfig", "Yarn", "config_of", "json_of"]
