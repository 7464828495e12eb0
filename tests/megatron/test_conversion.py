"""Hugging Face, Megatron and NeMo 2 folders into each other, in one process. Several ranks:
test_conversion_ranks.py.

Proves nothing about Transformer Engine on a GPU, nor that NeMo itself reads the folder
(benchmarks/nemo_parity.py).
"""

import hashlib
import json
import pickle
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import corruptions
import family_cases as families
import megatron_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from spark_nemo.config import MegatronConfig
from spark_nemo.config.errors import ConfigError
from spark_nemo.megatron.checkpoint import torch_dist_writer as streaming
from spark_nemo.megatron.checkpoint.conversion import convert
from spark_nemo.megatron.checkpoint.global_tensors import GlobalTensors
from spark_nemo.megatron.checkpoint.resumable import resumable_folder
from spark_nemo.megatron.checkpoint.torch_dist_reader import StoredCheckpoint
from spark_nemo.megatron.hf_files import SafetensorsFolder, write_tensors
from spark_nemo.models.spec import ModelSpec

pytestmark = pytest.mark.slow

GENERATION = '{"temperature":   0.7}'


def make_folder(folder, family, **changes):
    """Write a bfloat16 model in small shards, with tokenizer, generation settings and own code."""
    families.make_hf(family, folder, **changes)
    tensors = {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "dtype": "bfloat16", "auto_map": {"AutoModel": "modeling_evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(GENERATION)
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")
    write_tensors(
        folder,
        tensors.items(),
        {k: tuple(v.shape) for k, v in tensors.items()},
        torch.bfloat16,
        20_000,
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The Hugging Face folder of every family and its Megatron conversion."""
    root = tmp_path_factory.mktemp("conversion")
    found = {}
    for family in families.FAMILIES:
        hf = make_folder(root / f"{family}-hf", family)
        found[family] = (hf, convert(hf, root / f"{family}-megatron", "megatron").folder)
    return found


def same_tensors(one, other):
    one, other = SafetensorsFolder(one), SafetensorsFolder(other)
    assert set(one) == set(other)
    return all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("family", families.FAMILIES)
def test_there_and_back_is_bit_exact(folders, tmp_path, family):
    """Hugging Face -> Megatron -> NeMo -> Megatron -> Hugging Face gives the same bits,
    configuration, tokenizer and generation settings; code that came with the model stays behind.
    """
    hf, megatron = folders[family]
    convert(megatron, tmp_path / "nemo", "nemo")
    convert(tmp_path / "nemo", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "hf", "hf", max_shard_bytes=30_000)
    assert same_tensors(hf, tmp_path / "hf") and same_tensors(
        hf, convert(megatron, tmp_path / "one", "hf").folder
    )
    config = json.loads((hf / "config.json").read_text())
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {
        key: value for key, value in config.items() if key != "auto_map"
    }
    assert (tmp_path / "hf" / "generation_config.json").read_text() == GENERATION
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert not [path for path in tmp_path.rglob("*.py")]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_model_yaml_alone_is_enough(folders, tmp_path, family):
    """A NeMo folder of other code has no config.json: model.yaml gives the same tensors and the
    same model.
    """
    nemo = convert(folders[family][0], tmp_path / "nemo", "nemo").folder
    (nemo / "context" / "artifacts" / "config.json").unlink()
    back = convert(nemo, tmp_path / "hf", "hf").folder
    assert same_tensors(folders[family][0], back)
    shapes = [
        ModelSpec.from_hf(json.loads((x / "config.json").read_text()))
        for x in (folders[family][0], back)
    ]
    assert shapes[0] == shapes[1]
    assert all(key.startswith("module.") for key in StoredCheckpoint(nemo / "weights").tensors)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_keys_are_those_of_a_transformer_engine_model(folders, family):
    """Every sharded tensor that megatron-core asks for is in the folder with its global shape, and
    nothing else; every module that has an extra state under Transformer Engine has one for every
    layer. (Its modules are listed by hand: it cannot run here.)
    """
    stored = StoredCheckpoint(folders[family][1])
    model = cases.MegatronWorker.from_config(
        json.loads((folders[family][0] / "config.json").read_text()),
        MegatronConfig(dtype="bfloat16", distributed_optimizer=False),
        seed=5,
    ).model
    metadata = {"singleton_local_shards": False}
    wanted = {
        shard.key: shard.global_shape
        for entry in model.sharded_state_dict(metadata=metadata).values()
        for shard in families.shards_of(entry)
    }
    assert {key: tensor.shape for key, tensor in stored.tensors.items()} == wanted
    states = {name.rpartition("._extra_state")[0] for name in stored.objects}
    assert {
        "decoder.final_layernorm",
        "decoder.layers.self_attention.core_attention",
        "decoder.layers.self_attention.linear_qkv",
    } <= states
    assert ("decoder.layers.self_attention.q_layernorm" in states) == family.startswith("qwen3")
    assert ("decoder.layers.mlp.experts.experts.linear_fc1" in states) == (family == "qwen3_moe")
    assert (
        "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_1.3_2.4" in stored.objects
        or family != "qwen3_moe"
    )


@pytest.mark.parametrize("distributed", [False, True])
def test_training_checkpoints_become_hugging_face_folders(folders, tmp_path, distributed):
    """A checkpoint of a run, optimizer included, gives the trained weights; the optimizer's tensors
    stay behind.
    """
    layout = MegatronConfig(dtype="bfloat16", distributed_optimizer=distributed)
    worker = cases.MegatronWorker.from_hf(folders["qwen3"][0], layout, seed=0, optimizer=cases.ADAM)
    worker.train_step([cases.pack(cases.make_sequences())], cases.loss_fn)
    worker.save_checkpoint(tmp_path / "run", {})
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    exported = cases.export(worker)
    found = SafetensorsFolder(tmp_path / "hf")
    assert set(found) == set(exported) and all(
        torch.equal(found[name], exported[name]) for name in exported
    )
    assert not same_tensors(tmp_path / "hf", folders["qwen3"][0])
    corruptions.shutil.rmtree(tmp_path / "run" / "step-00000001" / "hf")
    with pytest.raises(ConfigError, match=r"--hf-config"):
        convert(tmp_path / "run", tmp_path / "again", "hf")
    convert(tmp_path / "run", tmp_path / "again", "hf", hf_config_from=folders["qwen3"][0])
    assert same_tensors(tmp_path / "hf", tmp_path / "again")


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_killed_conversion_goes_on(folders, tmp_path, monkeypatch, to):
    """After Ctrl-C the output is absent; the same call reads only what no finished file holds and
    gives the same bits. Another job (its input has changed) starts over.
    """
    monkeypatch.setattr(streaming, "FILE_BYTES", 30_000)
    hf, source = folders["llama"][0], folders["llama"][to == "hf"]
    read, budget = [], [12]
    original = SafetensorsFolder.__getitem__ if to == "megatron" else StoredCheckpoint.read

    def counting(self, name, *rest):
        if len(read) == budget[0]:
            raise KeyboardInterrupt
        read.append(name)
        return original(self, name, *rest)

    if to == "megatron":
        monkeypatch.setattr(SafetensorsFolder, "__getitem__", counting)
    else:
        monkeypatch.setattr(StoredCheckpoint, "read", counting)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to, max_shard_bytes=30_000)
    assert not (tmp_path / "out").exists()
    total = len(
        GlobalTensors.of(ModelSpec.from_hf(json.loads((hf / "config.json").read_text()))).pieces
    )
    budget[0], read[:] = 10**9, []
    convert(source, tmp_path / "out", to, max_shard_bytes=30_000)
    monkeypatch.undo()
    assert 0 < len(read) < (total if to == "hf" else len(SafetensorsFolder(hf)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    back = (
        tmp_path / "out"
        if to == "hf"
        else convert(tmp_path / "out", tmp_path / "back", "hf").folder
    )
    assert same_tensors(hf, back)


def test_a_killed_conversion_with_another_config_starts_over(folders, tmp_path, monkeypatch):
    """Files finished under one --hf-config are of no use under another: with fewer rows of
    vocabulary the embedding in them would be longer than config.json says. The output is that of a
    conversion that was never killed.
    """
    hf, megatron = folders["llama"]
    (tmp_path / "config").mkdir()
    text = json.dumps({**json.loads((hf / "config.json").read_text()), "vocab_size": 60})
    (tmp_path / "config" / "config.json").write_text(text)
    read, original = [], StoredCheckpoint.read

    def counting(self, name, *rest):
        if len(read) == 6:
            raise KeyboardInterrupt
        read.append(name)
        return original(self, name, *rest)

    monkeypatch.setattr(StoredCheckpoint, "read", counting)
    with pytest.raises(KeyboardInterrupt):
        convert(megatron, tmp_path / "out", "hf", max_shard_bytes=9_000)
    monkeypatch.undo()
    assert list((tmp_path / ".out.partial").glob("*.safetensors"))
    for name in ("out", "fresh"):
        convert(
            megatron,
            tmp_path / name,
            "hf",
            hf_config_from=tmp_path / "config",
            max_shard_bytes=9_000,
        )
    assert hashes(tmp_path / "out") == hashes(tmp_path / "fresh")


def test_one_process_at_a_time_makes_a_folder(tmp_path):
    """A second call for the same output, of the same job or another, fails and disturbs
    nothing: two writers of one file would leave holes in it. The kernel releases the lock of a
    killed process.
    """
    with resumable_folder(tmp_path / "out", {"job": 1}) as folder:
        (folder / "weights").write_text("whole")
        for job in (1, 2):
            with (
                pytest.raises(ConfigError, match="being made by another process"),
                resumable_folder(tmp_path / "out", {"job": job}),
            ):
                pytest.fail("handed out twice")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "whole"


def test_finished_files_behind_a_torn_record_are_kept(tmp_path):
    """A full disk tears the record of one file; what is recorded after that counts when the call is
    killed again.
    """
    writer = streaming.PartWriter(tmp_path, lambda num_bytes: None)
    (tmp_path / "__7_0.distcp").write_bytes(b"x" * 12)
    (tmp_path / streaming.PARTS).write_text('{"part": 3, "results": [["decod')
    writer.record(
        7,
        [WriteResult(MetadataIndex("w", torch.Size([0])), 12, _StorageInfo("__7_0.distcp", 0, 12))],
    )
    assert list(writer.finished_parts()) == [7]


@pytest.mark.slow
def test_checkpoints_of_other_code_are_read(tmp_path):
    """A checkpoint saved by a script with only megatron-core's public API, by one rank and by two
    tensor ranks with the vocabulary padded, becomes the same Hugging Face folder, with the values
    the script's own model has.
    """
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 69,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
    }
    script, found = Path(__file__).with_name("plain_megatron.py"), []
    assert "spark_nemo" not in re.sub(r'""".*?"""', "", script.read_text(), flags=re.DOTALL)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for tp in (1, 2):
        (tmp_path / f"tp{tp}").mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks = [
            subprocess.Popen(
                [sys.executable, script, tmp_path / f"tp{tp}", str(tp), str(rank), port],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(tp)
        ]
        for rank in ranks:
            _, err = rank.communicate(timeout=300)
            assert rank.returncode == 0, err[-2000:]
        found.append(
            SafetensorsFolder(
                convert(
                    tmp_path / f"tp{tp}", tmp_path / f"hf{tp}", "hf", hf_config_from=tmp_path
                ).folder
            )
        )
    assert set(found[0]) == set(found[1]) and all(
        torch.equal(found[0][name], found[1][name]) for name in found[0]
    )
    own = torch.load(tmp_path / "tp1" / "plain.pt", weights_only=False)
    for theirs, ours in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.layers.2.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
        ("decoder.layers.1.mlp.linear_fc2.weight", "model.layers.1.mlp.down_proj.weight"),
    ):
        assert torch.equal(own[theirs][:69] if "embed" in ours else own[theirs], found[0][ours])
    # Rows of the first key-value head: its two query heads, its key, its value.
    qkv = own["decoder.layers.0.self_attention.linear_qkv.bias"]
    assert torch.equal(found[0]["model.layers.0.self_attn.k_proj.bias"][:8], qkv[16:24])


def test_layer_norms_are_never_made_up(folders, tmp_path):
    """A NeMo folder without a layer norm is an error with its name, whichever it is."""
    nemo = convert(folders["qwen3_moe"][0], tmp_path / "nemo", "nemo").folder
    original = (nemo / "weights" / ".metadata").read_bytes()
    norms = [key for key in StoredCheckpoint(nemo / "weights").tensors if "norm" in key]
    assert len(norms) == 5
    for key in norms:
        corruptions.edit_metadata(
            lambda metadata, key=key: metadata.state_dict_metadata.pop(key), nemo / "weights"
        )
        with pytest.raises(ConfigError, match=f"lacks tensor {key.removeprefix('module.')} "):
            convert(nemo, tmp_path / "out", "hf")
        (nemo / "weights" / ".metadata").write_bytes(original)


def test_padding_of_the_vocabulary_is_cut(tmp_path, folders):
    """Rows that a tensor-parallel size added to embeddings do not reach Hugging Face; fewer rows
    are an error.
    """
    hf, megatron = folders["llama"]
    stored = StoredCheckpoint(megatron)
    assert stored.read("output_layer.weight", (60, 0), (7, 64)).shape == (7, 64)
    config = json.loads((hf / "config.json").read_text())
    for rows, message in (
        (60, None),
        (68, r"output_layer.weight in .* \(67, 64\), .* wants \(68, 64\)|embedding"),
    ):
        (tmp_path / str(rows)).mkdir()
        (tmp_path / str(rows) / "config.json").write_text(
            json.dumps({**config, "vocab_size": rows})
        )
        if message is None:
            out = convert(
                megatron, tmp_path / "out", "hf", hf_config_from=tmp_path / str(rows)
            ).folder
            assert torch.equal(
                SafetensorsFolder(out)["lm_head.weight"],
                SafetensorsFolder(hf)["lm_head.weight"][:60],
            )
        else:
            with pytest.raises(ConfigError, match=message):
                convert(megatron, tmp_path / "other", "hf", hf_config_from=tmp_path / str(rows))


def test_pickles_need_a_flag(folders, tmp_path):
    """pytorch_model.bin is an error without the flag, and even with it runs nothing."""
    source = tmp_path / "bin"
    source.mkdir()
    hf = folders["qwen2"][0]
    (source / "config.json").write_bytes((hf / "config.json").read_bytes())
    torch.save(dict(SafetensorsFolder(hf)), source / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"--trust-pickle"):
        convert(source, tmp_path / "out", "megatron")
    convert(source, tmp_path / "out", "megatron", trust_pickle=True)
    assert same_tensors(hf, convert(tmp_path / "out", tmp_path / "hf", "hf").folder)
    (source / "pytorch_model.bin").write_bytes(
        pickle.dumps({"x": corruptions.Evil((pytest.fail, ("it ran",)))})
    )
    with pytest.raises(ConfigError, match=r"pytorch_model.bin cannot be read"):
        convert(source, tmp_path / "other", "megatron", trust_pickle=True)


def test_types_are_converted_only_when_asked(folders, tmp_path):
    """--dtype converts every tensor and config.json's dtype; without it the types must match."""
    hf = folders["qwen2"][0]
    out = convert(hf, tmp_path / "out", "hf", dtype=torch.float32).folder
    tensors = SafetensorsFolder(out)
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert all(
        torch.equal(tensors[name].bfloat16(), x) for name, x in SafetensorsFolder(hf).items()
    )
    save_file({"x": torch.zeros(2, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"tensor x .* has dtype I8"):
        SafetensorsFolder(tmp_path).describe()


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_damaged_inputs_end_in_a_clear_error(tmp_path, kind, monkeypatch):
    """Over 200 of Hugging Face and over 70 of Megatron: truncated, missing, swapped, surplus,
    retyped, forged. Each is a one-line ConfigError that names a file, tensor or key, the output is
    absent and the input is what it was.
    """
    monkeypatch.chdir(tmp_path)
    source = make_folder(tmp_path / "untied", "qwen3", tie_word_embeddings=False)
    if kind == "megatron":
        source = convert(source, tmp_path / "mg", "megatron").folder
    damages = corruptions.all_of(kind)
    assert len(damages) >= {"hf": 200, "megatron": 70}[kind]
    assert len(dict(damages)) == len(damages)
    silent = []
    for number, (name, damage) in enumerate(damages):
        folder = tmp_path / f"case{number}"
        corruptions.shutil.copytree(source, folder)
        damage(folder)
        before = hashes(folder)
        try:
            convert(folder, tmp_path / "out", "hf" if kind == "megatron" else "megatron")
            silent.append(name)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1 and (
                str(folder) in str(error) or "index" in str(error)
            ), name
        assert hashes(folder) == before, name
        assert not (tmp_path / ".out.partial").exists() and (
            name in silent or not (tmp_path / "out").exists()
        ), name
        corruptions.shutil.rmtree(folder)
        corruptions.shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert silent == []
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_common_file_is_named(folders, tmp_path):
    """A byte of common.pt flipped 400 times, which torch answers with nine kinds of exceptions: a
    ConfigError or, where the byte did not matter, the values.
    """
    folder, draw = (
        corruptions.shutil.copytree(folders["qwen3"][1], tmp_path / "mg"),
        random.Random(0),
    )
    data, refused = (folder / "common.pt").read_bytes(), 0
    for _ in range(400):
        place = draw.randrange(len(data))
        (folder / "common.pt").write_bytes(
            data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
        )
        try:
            assert isinstance(StoredCheckpoint(folder).common(), dict)
        except ConfigError as error:
            assert "common.pt" in str(error) and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 100


def test_seventy_billion_layout_in_small(tmp_path):
    """80 layers, 8 key-value heads, 64 heads, tiny widths: converted, read as TP8 x PP4 ranks
    would, put together, written, read as TP2 x PP2 and written back: bit-exact. Boxes are the
    families' shards; no megatron process runs.
    """
    sizes = {
        "num_hidden_layers": 80,
        "hidden_size": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 2,
        "intermediate_size": 112,
        "vocab_size": 152,
    }
    hf = make_folder(tmp_path / "hf", "llama", **sizes)
    current = convert(hf, tmp_path / "megatron", "megatron").folder
    shape = ModelSpec.from_hf(json.loads((hf / "config.json").read_text()))
    for tp, pp in ((8, 4), (2, 2)):
        current = resharded(current, tmp_path / f"tp{tp}pp{pp}", shape, tp, pp)
    assert same_tensors(hf, convert(current, tmp_path / "back", "hf").folder)


def resharded(source, target, shape, tp, pp):
    """Read every (tensor, stage) rank's share of every parameter, as megatron-core lays it out, and
    write what they make together.
    """
    stored, tensors = StoredCheckpoint(source), GlobalTensors.of(shape)
    corruptions.shutil.copytree(source / "hf", target / "hf")
    shares = {}
    for stage in range(pp):
        for rank in range(tp):
            for number, piece in enumerate(tensors.pieces):
                layer = piece.offset[0] if piece.key.startswith("decoder.layers.") else None
                home = (
                    layer // (shape.num_layers // pp)
                    if layer is not None
                    else 0
                    if piece.key.startswith("embedding")
                    else pp - 1
                )
                if home == stage:
                    shares[number, rank] = read_share(stored, piece, tp, rank)

    def read(number):
        piece = tensors.pieces[number]
        dim = piece.param.split.shard_dim
        parts = [shares[number, rank] for rank in range(tp)]
        if dim is None:
            return parts[0]
        if piece.key.endswith("linear_fc1.weight"):
            return torch.cat(
                [half for n in (0, 1) for half in (part.chunk(2)[n] for part in parts)]
            )
        return torch.cat(parts, dim)

    boxes = [
        streaming.Box(x.key, tensors.shapes[x.key], torch.bfloat16, x.offset, x.size)
        for x in tensors.pieces
    ]
    streaming.write_torch_dist(target, streaming.Source(boxes, read, {}), lambda num_bytes: None)
    return target


def read_share(stored, piece, tp, rank):
    """One rank's part; of fused gate and up, a part of each."""
    dim, stacked = piece.param.split.shard_dim, sum(s == 1 for s in piece.size[:1])
    if dim is None:
        return stored.read(piece.key, piece.offset, piece.size).reshape(piece.size[stacked:])
    halves = 2 if piece.key.endswith("linear_fc1.weight") else 1
    length = piece.size[stacked + dim] // halves // tp
    size = list(piece.size)
    size[stacked + dim] = length
    parts = []
    for half in range(halves):
        offset = list(piece.offset)
        offset[stacked + dim] += half * length * tp + rank * length
        parts.append(stored.read(piece.key, tuple(offset), tuple(size)).reshape(size[stacked:]))
    return torch.cat(parts)
