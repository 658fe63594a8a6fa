"""Recipes: options of a run in YAML files, and the whole of a run made from those that were given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from fastqat.train.config import OPTIONS, Config
from fastqat.train.extras import import_extra


def make_config(given: dict[str, Any]) -> Config:
    """Complete the options that were given by a recipe.

    Args:
        given: fields of :class:`Config`, and "recipe": files, or names of :func:`recipes`, of which the later ones win.
            Where none of them names data, they are laid over the recipe of the data set's name, if there is one.

    Raises:
        ValueError: an option or the recipe is wrong.
        FileNotFoundError: there is no such recipe.
    """
    given = dict(given)
    layers = [read_recipe(str(name)) for name in given.pop("recipe", ())]
    data = str(given.get("data", Config.data))
    if data in recipes() and not any("data" in layer for layer in layers):
        layers.insert(0, read_recipe(data))
    options: dict[str, Any] = {}
    for layer in [*layers, given]:
        options |= layer
    return Config(**options)


def recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("fastqat.train") / "recipes"
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read the options of a YAML file.

    Args:
        name: of a recipe in :func:`recipes`, or the path of a file.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a wrong value; the message names it.
        FileNotFoundError: there is neither.
        ImportError: PyYAML is not installed.
    """
    if name in recipes():
        text = (resources.files("fastqat.train") / "recipes" / f"{name}.yaml").read_text()
    elif Path(name).is_file():
        text = read_text(Path(name))
    else:
        raise FileNotFoundError(f"recipe {name}: wanted a file, or one of {', '.join(recipes())}; got neither")
    return parse_options(text, f"recipe {name}")


def parse_options(text: str, source: str) -> dict[str, Any]:
    """Check the options of a YAML text.

    Args:
        text: a mapping of names of options to values.
        source: of the text, for messages.

    Raises:
        ValueError: it is no mapping, or has an unknown key or a wrong value; the message names it.
        ImportError: PyYAML is not installed.
    """
    yaml = import_extra("yaml")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: wanted YAML; got {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source}: wanted options, as in 'lr: 0.01'; got {type(content).__name__}")
    checked = {}
    for key, value in content.items():
        if key not in OPTIONS:
            raise ValueError(f"{source}: {nearest(str(key), OPTIONS)}")
        try:
            checked[key] = OPTIONS[key].accept(value)
        except ValueError as error:
            raise ValueError(f"{source}: {key}: {error}") from None
    return checked


def nearest(key: str, known: Iterable[str]) -> str:
    """Say that an option is unknown, and which known one is nearest."""
    close = difflib.get_close_matches(key.lower(), list(known), n=1, cutoff=0.65)
    return f"unknown option {key!r}; " + (f"did you mean {close[0]!r}?" if close else "all are in fastqat train --help")


def read_text(path: Path) -> str:
    """Read a YAML file.

    Raises:
        ValueError: it is no text.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted YAML in UTF-8; got {error}") from None
