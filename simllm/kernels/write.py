"""Kernel profiles as YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from simllm.errors import InputError
from simllm.kernels.schema import KernelFile

__all__ = ["kernel_yaml", "write_profiles", "yaml_text"]


def kernel_yaml(profile: KernelFile, name: str | None = None) -> str:
    """A kernel profile as the text of its file; ``name`` is that of the file, if it is not the profile's."""
    return yaml_text(msgspec.to_builtins(msgspec.structs.replace(profile, name=name or profile.name)))


def write_profiles(profiles: Mapping[str, KernelFile], folder: Path) -> list[Path]:
    """Write profile files as YAML, each whole or not at all.

    Parameters
    ----------
    profiles : mapping of str to KernelFile
        Files by name.
    folder : Path
        Folder to write to; it must exist.

    Returns
    -------
    list of Path
        The files written.
    """
    written = []
    for name, profile in profiles.items():
        path = folder / f"{name}.yaml"
        text = kernel_yaml(profile)
        partial = path.with_suffix(".yaml.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; give a folder that can be") from None
        written.append(path)
    return written


def yaml_text(data: Any) -> str:
    """Plain data as YAML: quantities on one line each, long texts folded."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quantities and other flat mappings of short values on one line."""

    def represent(dumper: Any, mapping: dict[Any, Any]) -> Any:
        mapping = {key: value for key, value in mapping.items() if value is not None}
        flat = all(not isinstance(value, (dict, list)) and len(str(value)) < 24 for value in mapping.values())
        return dumper.represent_mapping("tag:yaml.org,2002:map", mapping, flow_style=flat and len(mapping) < 8)

    def represent_list(dumper: Any, values: list[Any]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)

    def represent_text(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=">" if len(text) > 80 else None)

    Dumper.add_representer(dict, represent)
    Dumper.add_representer(list, represent_list)
    Dumper.add_representer(str, represent_text)
    text: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, width=118, allow_unicode=True)
    return text
