"""Values as YAML that people read: no anchors, texts of several lines as blocks."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def as_yaml(*documents: Any) -> str:
    """One or several documents, keys in their order."""
    return "---\n".join(yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120) for value in documents)
