"""Where in a YAML file a field stands, so that an error about it can name the line."""

import re

import yaml

Path = tuple[str | int, ...]


def steps(field: str) -> Path:
    """`a[0].b` to ("a", 0, "b"); an element without a number (`[...]`) ends the path."""
    found: list[str | int] = []
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", field):
        if name:
            found.append(name)
        elif index.isdigit():
            found.append(int(index))
        else:
            break
    return tuple(found)


def line(node: yaml.Node | None, path: Path) -> int | None:
    """The line, from 1, of the deepest existing step of a path below a node; None if there is not even the first."""
    found = None
    for step in path:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == step:
                    found, node = key.start_mark.line + 1, value
                    break
            else:
                return found
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            found = node.start_mark.line + 1
    return found
