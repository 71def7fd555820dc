"""Puts the converter and train.py, which lie beside the package in a checkout, into the package in a wheel."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":  # and not "editable", which is the checkout itself
            build_data["force_include"] |= {"convert": "opt_jax/convert", "train.py": "opt_jax/train.py"}
