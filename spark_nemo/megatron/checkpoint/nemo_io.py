"""``context/io.json`` of a NeMo 2 folder: the graph of Python objects that NeMo's
``io.load_context`` builds.

It is written from the same tree as ``model.yaml``, in the form that fiddle 0.3 (which NeMo uses)
gives its ``fdl.Config`` objects. Reading takes the plain values only: what the file names is
neither imported nor called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spark_nemo.config.errors import ConfigError

IO_JSON = "io.json"
ROOT = "<root>"
_VERSION = "0.0.1"
_BUILTINS, _FIDDLE = "builtins", "fiddle._src.config"


def call(target: str, **arguments: Any) -> dict[str, Any]:
    """A node of model.yaml's tree: ``target`` called with ``arguments``."""
    return {"_target_": target, **arguments}


def symbol(target: str) -> dict[str, Any]:
    """A node of model.yaml's tree: the class, function or constant ``target`` itself."""
    return {"_target_": target, "_call_": False}


def io_json(model: dict[str, Any]) -> str:
    """The text of io.json for the model of model.yaml, in a context as ``llm.import_ckpt`` of NeMo
    writes it.

    The trainer there is the one of a conversion on one CPU; NeMo's own scripts bring another.
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
    """The arguments of ``of`` (as in "model.config") in ``folder/io.json`` that are numbers, texts,
    booleans or null.

    Empty when there is no such file. ``ConfigError`` when it is damaged.
    """
    path = folder / IO_JSON
    if not path.is_file():
        return {}
    found, prefix = {}, f"{ROOT}.{of}."
    try:
        for entry in json.loads(path.read_text())["objects"].values():
            for _, value in (item for item in entry["items"] if isinstance(item[1], dict)):
                for where in value.get("paths", ()) if value["type"] == "leaf" else ():
                    if where.startswith(prefix) and where.removeprefix(prefix).isidentifier():
                        found[where.removeprefix(prefix)] = value["value"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}") from error
    return found


class _Graph:
    """Numbered objects that refer to each other, as fiddle serialises them."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def add(self, tree: Any, path: str) -> dict[str, Any]:
        """What stands for ``tree`` in its parent; ``path`` is how NeMo asks for a part of the
        context.
        """
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
        """Which function the values are arguments of. Tags and history are fiddle's and stay empty."""
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
