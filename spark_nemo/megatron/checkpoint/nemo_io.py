"""``context/io.json`` of a NeMo 2 folder: the graph of objects that ``io.load_context`` builds.

It is written from the same tree as ``model.yaml``, as fiddle 0.3 (which NeMo uses) serialises its
``fdl.Config`` objects. Reading takes plain values only: nothing that the file names is imported or
called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError

IO_JSON = "io.json"
ROOT = "<root>"
_VERSION = "0.0.1"
_BUILTINS = "builtins"
_FIDDLE = "fiddle._src.config"


def call(target: str, **arguments: Any) -> dict[str, Any]:
    """Return a node of model.yaml's tree: ``target`` called with ``arguments``."""
    return {"_target_": target, **arguments}


def symbol(target: str) -> dict[str, Any]:
    """Return a node of model.yaml's tree: the class, function or constant ``target`` itself."""
    return {"_target_": target, "_call_": False}


def io_json(model: dict[str, Any]) -> str:
    """Return the text of io.json for the tree of model.yaml, as NeMo's ``llm.import_ckpt`` does.

    Its trainer is that of a conversion on one CPU, which NeMo's own scripts replace.
    """
    strategy = call(
        "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy",
        ckpt_save_optimizer=False,
    )
    trainer = call(
        "nemo.lightning.pytorch.trainer.Trainer", accelerator="cpu", devices=1, strategy=strategy
    )
    graph = _Graph()
    root = graph.add(
        call("nemo.lightning.io.pl.TrainerContext", model=model, trainer=trainer, extra={}), ROOT
    )
    return json.dumps(
        {
            "root": root,
            "objects": graph.objects,
            "refcounts": dict.fromkeys(graph.objects, 1),
            "version": _VERSION,
        }
    )


def plain_values(folder: Path, of: str) -> dict[str, Any]:
    """Return the plain arguments (numbers, texts, booleans, null) of ``of`` in ``folder/io.json``.

    ``of`` is a path such as "model.config". Empty without the file. Raises ``ConfigError`` for a
    damaged one.
    """
    path = folder / IO_JSON
    if not path.is_file():
        return {}
    prefix = f"{ROOT}.{of}."
    found = {}
    try:
        for entry in json.loads(path.read_text())["objects"].values():
            for _, value in entry["items"]:
                if not isinstance(value, dict) or value["type"] != "leaf":
                    continue
                for where in value.get("paths", ()):
                    name = where.removeprefix(prefix)
                    if where.startswith(prefix) and name.isidentifier():
                        found[name] = value["value"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    return found


class _Graph:
    """Numbered objects that refer to each other, as fiddle serialises them."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def add(self, tree: Any, path: str) -> dict[str, Any]:
        """Add ``tree`` and return its reference; ``path`` is the name by which NeMo loads it."""
        if not isinstance(tree, dict):
            return {"type": "leaf", "value": tree, "paths": [path]}
        if tree.get("_call_") is False:
            return {**_reference(tree["_target_"]), "paths": [path]}
        arguments = {key: value for key, value in tree.items() if key != "_target_"}
        if "_target_" not in tree:
            items = [
                [f"Key(key={key!r})", self.add(value, f"{path}[{key!r}]")]
                for key, value in arguments.items()
            ]
            return self._store(
                {
                    "type": _reference(f"{_BUILTINS}.dict"),
                    "items": items,
                    "metadata": self._names(list(arguments)),
                    "paths": [path],
                }
            )
        items = [
            [_attribute(key), self.add(value, f"{path}.{key}")] for key, value in arguments.items()
        ]
        return self._store(
            {
                "type": _reference(f"{_FIDDLE}.Config"),
                "items": items,
                "metadata": self._metadata(tree["_target_"], list(arguments)),
                "paths": [path],
            }
        )

    def _metadata(self, target: str, arguments: list[str]) -> dict[str, Any]:
        """Add the name of the function the values are arguments of; tags and history are empty."""
        kind = _reference(f"{_FIDDLE}.BuildableTraverserMetadata")
        values = {
            "fn_or_cls": _reference(target),
            "argument_names": self._names(arguments),
            "argument_tags": self._empty(),
            "argument_history": self._empty(),
        }
        return self._store(
            {
                "type": kind,
                "items": [[_attribute(key), value] for key, value in values.items()],
                "metadata": kind,
            }
        )

    def _names(self, values: list[str]) -> dict[str, Any]:
        items = [[f"Index(index={index})", value] for index, value in enumerate(values)]
        return self._store(
            {"type": _reference(f"{_BUILTINS}.tuple"), "items": items, "metadata": None}
        )

    def _empty(self) -> dict[str, Any]:
        return self._store(
            {"type": _reference(f"{_BUILTINS}.dict"), "items": [], "metadata": self._names([])}
        )

    def _store(self, node: dict[str, Any]) -> dict[str, Any]:
        key = f"object_{len(self.objects) + 1}"
        self.objects[key] = node
        return {"type": "ref", "key": key}


def _attribute(key: str) -> str:
    return f"Attr(name={key!r})"


def _reference(target: str) -> dict[str, Any]:
    module, _, name = target.rpartition(".")
    return {"type": "pyref", "module": module, "name": name}
