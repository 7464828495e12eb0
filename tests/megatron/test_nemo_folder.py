"""NeMo 2.7's folder in small: io.json, model.yaml, metadata of megatron-core 0.15. One process.

The texts are written here after what ``llm.import_ckpt`` was seen writing. That NeMo itself reads
and writes such folders is shown by benchmarks/nemo_parity.py, not here.
"""

import json
import pickle

import corruptions
import pytest
import yaml
from safetensors.torch import load_file
from test_conversion import make_folder, same_tensors
from torch.distributed.checkpoint.metadata import Metadata

from spark_nemo.config.errors import ConfigError
from spark_nemo.megatron.checkpoint.conversion import convert
from spark_nemo.megatron.checkpoint.nemo_io import call, io_json, plain_values, symbol
from spark_nemo.megatron.checkpoint.torch_dist_reader import StoredCheckpoint
from spark_nemo.megatron.hf_files import SafetensorsFolder, write_tensors

INPUT_NORM = "module.decoder.layers.self_attention.linear_qkv.layer_norm_weight"


@pytest.fixture
def folders(tmp_path):
    """A tied Qwen2 as a Hugging Face and as a NeMo folder, with a tokenizer for NeMo."""
    hf = make_folder(tmp_path / "hf", "qwen2")
    (hf / "tokenizer_config.json").write_text("{}")
    return hf, convert(hf, tmp_path / "nemo", "nemo").folder


def resolved(graph, node):
    """Values of io.json without numbering and paths: [function, arguments] for what is to be
    called.
    """
    if not isinstance(node, dict):
        return node
    if node["type"] == "ref":
        return resolved(graph, graph["objects"][node["key"]])
    if node["type"] == "leaf":
        return node["value"]
    if node["type"] == "pyref":
        return f"{node['module']}.{node['name']}"
    items = [resolved(graph, value) for _, value in node["items"]]
    kind, metadata = resolved(graph, node["type"]), resolved(graph, node["metadata"])
    if kind == "fiddle._src.config.Config":
        function, names, tags, history = metadata
        assert tags == history == {}
        return [function, dict(zip(names, items, strict=True))]
    return dict(zip(metadata, items, strict=True)) if kind == "builtins.dict" else items


def test_io_json_builds_what_model_yaml_says(folders):
    """Followed as fiddle follows it, io.json calls NeMo's classes with the values of model.yaml;
    every part that NeMo asks for by path is there. The names are those of NeMo 2.7.3.
    """
    context = folders[1] / "context"
    graph = json.loads((context / "io.json").read_text())
    function, found = resolved(graph, graph["root"])
    assert function == "nemo.lightning.io.pl.TrainerContext" and found["extra"] == {}
    assert found["trainer"][0] == "nemo.lightning.pytorch.trainer.Trainer"
    model, arguments = found["model"]
    assert model == "nemo.collections.llm.gpt.model.qwen2.Qwen2Model" and set(arguments) == {
        "config",
        "tokenizer",
    }
    tree = yaml.safe_load((context / "model.yaml").read_text())["config"]
    config, values = arguments["config"]
    assert config == tree.pop("_target_") and values["params_dtype"] == "torch.bfloat16"
    assert values["generation_config"][1]["pretrained_model_name_or_path"] == "./artifacts"
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    assert len(plain) > 15 and plain.items() <= values.items()
    assert plain_values(context, "model.config") == plain
    paths = {path for entry in graph["objects"].values() for path in entry.get("paths", ())}
    assert {"<root>", "<root>.model", "<root>.model.config", "<root>.model.tokenizer"} <= paths


def test_files_that_disagree_are_an_error(folders, tmp_path):
    """NeMo builds its model of io.json and we read model.yaml: a value that differs is named. A
    damaged io.json is an error, a folder without it (of older writers) is none, and io.json alone
    is not enough.
    """
    context, other = folders[1] / "context", tmp_path / "out"
    original = (context / "io.json").read_text()
    (context / "io.json").write_text(original.replace('"value": 10000.0', '"value": 500000.0'))
    with pytest.raises(
        ConfigError, match=r"rotary_base=10000.0, .*io.json, which NeMo reads, says 500000.0"
    ):
        convert(folders[1], other, "hf")
    for damage in ("{", "[]", '{"objects": {"x": {"items": [3]}}}', '{"objects": {"x": 1}}'):
        (context / "io.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"io.json is damaged"):
            convert(folders[1], other, "hf")
    (context / "io.json").unlink()
    assert same_tensors(folders[0], convert(folders[1], other, "hf").folder)
    (context / "model.yaml").unlink()
    (context / "io.json").write_text(original)
    with pytest.raises(ConfigError, match=r"model.yaml is missing .io.json alone .* --hf-config"):
        convert(folders[1], tmp_path / "again", "hf")


def test_nothing_that_io_json_names_is_imported(folders, tmp_path, monkeypatch):
    """A module that would run when imported is named as class, constant and function: reading
    leaves it alone.
    """
    (tmp_path / "evil_nemo.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    config = call("evil_nemo.Config", num_layers=2, activation_func=symbol("evil_nemo.f"))
    model = call("evil_nemo.Model", config=config)
    (folders[1] / "context" / "io.json").write_text(io_json(model))
    assert same_tensors(folders[0], convert(folders[1], tmp_path / "out", "hf").folder)


def test_metadata_of_megatron_core_0_15_is_read(folders, tmp_path):
    """megatron-core 0.15 stores a class of its own with a field more; 0.16 has an empty class of
    that name, of which nothing could be read.
    """
    path = folders[1] / "weights" / ".metadata"
    content = pickle.loads(path.read_bytes())
    assert type(content) is Metadata
    old = b"megatron.core.dist_checkpointing.strategies.torch MCoreMetadata".split()
    plain = pickle.dumps(content, protocol=2)
    written = plain.replace(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"c%b\n%b\n" % tuple(old), 1
    )
    assert written != plain
    path.write_bytes(written)
    assert same_tensors(folders[0], convert(folders[1], tmp_path / "out", "hf").folder)


def test_norms_that_nemo_lost_are_an_error(folders, tmp_path):
    """Without Transformer Engine NeMo's import leaves the layers' norms at 1 and sets the final
    one. That is an error; a new model, whose norms are all 1, is not. A single lost norm of one
    layer cannot be told from a trained one.
    """
    hf, found = folders[0], []
    for final in (None, 1.0):
        folder = tmp_path / f"final-{final}"
        tensors = dict(SafetensorsFolder(hf))
        for name in tensors:
            if name.endswith("layernorm.weight") or (final and name == "model.norm.weight"):
                tensors[name] = tensors[name] * 0 + 1
        corruptions.shutil.copytree(
            hf, folder, ignore=lambda _, names: [x for x in names if "safetensors" in x]
        )
        write_tensors(
            folder,
            tensors.items(),
            {k: tuple(v.shape) for k, v in tensors.items()},
            tensors["model.norm.weight"].dtype,
            1 << 30,
        )
        found.append(convert(folder, tmp_path / f"nemo-{final}", "nemo").folder)
    with pytest.raises(ConfigError, match=f"{INPUT_NORM} is 1 everywhere"):
        convert(found[0], tmp_path / "out", "hf")
    fresh = convert(found[1], tmp_path / "fresh", "hf").folder
    assert float(load_file(fresh / "model.safetensors")["model.norm.weight"].max()) == 1.0
    assert INPUT_NORM in StoredCheckpoint(found[1] / "weights").tensors


def test_every_chat_template_travels_along(tmp_path):
    """transformers keeps templates besides the default in a folder of their own; they come back,
    through each format. Files of other kinds in it stay behind.
    """
    extra = make_folder(tmp_path / "hf", "qwen3") / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("{{ tools }}")
    (extra / "evil.py").write_text("raise SystemExit")
    for source, target in (("hf", "nemo"), ("nemo", "megatron"), ("megatron", "back")):
        convert(tmp_path / source, tmp_path / target, target if target != "back" else "hf")
    back = tmp_path / "back" / "additional_chat_templates"
    assert [path.name for path in back.iterdir()] == ["tool_use.jinja"]
    assert (back / "tool_use.jinja").read_text() == "{{ tools }}"
