"""Ways to damage a copy of a checkpoint folder: ``all_of(kind)`` gives (name, function of the
folder).
"""

import json
import pickle
import shutil
import struct
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

INDEX = "model.safetensors.index.json"


def edit_json(file, change, folder):
    path = folder / file
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def write(file, content, folder):
    (folder / file).write_bytes(content)


def cut(file, length, folder):
    """Keep ``length`` bytes, or this fraction of the file; negative counts from the end."""
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(
        data[: int(len(data) * length) if isinstance(length, float) else length]
    )


def shard(number, folder):
    return sorted(folder.glob("*.safetensors"))[number].name


def in_shard(edit, number, *arguments):
    return lambda folder: edit(shard(number, folder), *arguments, folder)


def edit_header(change, number, folder):
    path = folder / shard(number, folder)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(header):
    return next(value for key, value in header.items() if key != "__metadata__")


def header_length(value, number, folder):
    path = folder / shard(number, folder)
    path.write_bytes(struct.pack("<Q", value) + path.read_bytes()[8:])


def edit_tensors(change, name, folder):
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors, name)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"}
    )


def grow(tensors, name):
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def retype(dtype, tensors, name):
    tensors[name] = tensors[name].to(dtype)


def swap(one, other, folder):
    """Each under the other's name, where the index says; their shapes differ."""
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    values = {name: load_file(folder / files[name])[name] for name in (one, other)}
    for name, value in ((one, values[other]), (other, values[one])):
        edit_tensors(lambda tensors, key, value=value: tensors.update({key: value}), name, folder)


def link(number, folder):
    path = folder / shard(number, folder)
    outside = folder.parent / f"outside-{folder.name}.safetensors"
    shutil.move(path, outside)
    path.symlink_to(outside)


TENSORS = [
    f"model.layers.{i}.{name}"
    for i in (0, 1)
    for name in (
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_norm.weight",
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    )
] + ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"]
PATHS = [
    "../outside.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "..",
    "",
    ".",
    5,
    None,
    "weights.bin",
    "../../etc/passwd.safetensors",
    ["model.safetensors"],
    "C:\\x\\..\\y",
]
CONFIG = [
    ("num_hidden_layers", 1),
    ("num_hidden_layers", 3),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -2),
    ("num_hidden_layers", "2"),
    ("num_hidden_layers", 2.5),
    ("hidden_size", 32),
    ("hidden_size", 65),
    ("intermediate_size", 97),
    ("num_attention_heads", 4),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 4),
    ("num_key_value_heads", 5),
    ("head_dim", 8),
    ("vocab_size", 66),
    ("vocab_size", 68),
    ("tie_word_embeddings", True),
    ("model_type", "gpt2"),
    ("model_type", "qwen2"),
    ("model_type", "llama"),
    ("model_type", None),
    ("dtype", "float32"),
    ("dtype", "int8"),
    ("dtype", 16),
    ("use_sliding_window", True),
    ("quantization_config", {"bits": 4}),
    ("hidden_act", "gelu"),
]
REQUIRED = [
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
]


def hugging_face():
    for number in range(4):
        for length in (0, 7, 8, 40, 0.5, 0.99, -1):
            yield f"shard {number} cut to {length}", in_shard(cut, number, length)
        for value in (0, 1, 2**31, 2**63, 2**64 - 1):
            yield f"shard {number} header length {value}", partial(header_length, value, number)
        yield f"shard {number} gone", lambda folder, n=number: (folder / shard(n, folder)).unlink()
        yield (
            f"shard {number} longer",
            lambda folder, n=number: (folder / shard(n, folder)).open("ab").write(b"x"),
        )
        yield f"shard {number} is a link out", partial(link, number)
    headers = {
        "overlap": lambda h: first(h).update(data_offsets=[0, first(h)["data_offsets"][1] * 2]),
        "negative": lambda h: first(h).update(data_offsets=[-4, first(h)["data_offsets"][1]]),
        "backwards": lambda h: first(h).update(data_offsets=first(h)["data_offsets"][::-1]),
        "hole": lambda h: first(h).update(data_offsets=[o + 2 for o in first(h)["data_offsets"]]),
        "not a number": lambda h: json.dumps(h).replace(
            '"data_offsets": [0', '"data_offsets": [NaN', 1
        ),
        "NaN shape": lambda h: first(h).update(shape=[float("nan")]),
        "shape": lambda h: first(h).update(shape=[1, 2, 3]),
        "type": lambda h: first(h).update(dtype="F7"),
        "integers": lambda h: first(h).update(dtype="I16"),
        "bytes": lambda h: "\xff\xfe{}",
        "list": lambda h: "[]",
        "empty": lambda h: "{}",
        "unclosed": lambda h: json.dumps(h)[:-2],
        "nested": lambda h: "[" * 5000,
    }
    for name, change in headers.items():
        for number in (0, 2):
            yield f"header {number} {name}", partial(edit_header, change, number)
    for name in TENSORS:
        yield (
            f"{name} not in the index",
            partial(edit_json, INDEX, lambda v, n=name: v["weight_map"].pop(n)),
        )
        yield f"{name} not in its file", partial(edit_tensors, lambda t, n: t.pop(n), name)
        yield f"{name} grown", partial(edit_tensors, grow, name)
        yield f"{name} float32", partial(edit_tensors, partial(retype, torch.float32), name)
        yield f"{name} int64", partial(edit_tensors, partial(retype, torch.int64), name)
    for one, other in zip(TENSORS, TENSORS[4:]):
        yield f"{one} and {other} swapped", partial(swap, one, other)
    for path in PATHS:
        yield (
            f"index points to {path!r}",
            partial(
                edit_json, INDEX, lambda v, p=path: v["weight_map"].update({"model.norm.weight": p})
            ),
        )
    yield (
        "surplus in the index",
        partial(
            edit_json,
            INDEX,
            lambda v: v["weight_map"].update({"model.extra": v["weight_map"]["model.norm.weight"]}),
        ),
    )
    yield (
        "surplus tensor",
        partial(edit_tensors, lambda t, n: t.update(extra=torch.zeros(1)), "model.norm.weight"),
    )
    for text in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": 1}',
        b"\xff",
    ):
        yield f"index is {text!r}", partial(write, INDEX, text)
    yield from config_of("config.json")
    yield "pickles only", _only_pickles


def _only_pickles(folder):
    for path in list(folder.glob("*.safetensors")) + [folder / INDEX]:
        path.unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def config_of(file):
    for key in REQUIRED:
        yield f"config without {key}", partial(edit_json, file, lambda v, k=key: v.pop(k))
    for key, value in CONFIG:
        # A distributed checkpoint has the trainer's dtype, and rows beyond the vocabulary are its
        # padding.
        if file == "config.json" or (key != "dtype" and (key, value) != ("vocab_size", 66)):
            yield (
                f"config {key}={value!r}",
                partial(edit_json, file, lambda v, k=key, x=value: v.update({k: x})),
            )
    for text in (b"", b"{", b"[]", b"null", b"\xff\xfe"):
        yield f"config is {text!r}", partial(write, file, text)


class Evil:
    """A pickle of this touches a file."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        import os

        return self.call or (os.mkdir, ("evil-was-here",))


def edit_metadata(change, folder):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def point_to(name, metadata):
    next(iter(metadata.storage_data.values())).relative_path = name


def forget(key, metadata):
    metadata.state_dict_metadata.pop(key)


def lose_file_entry(metadata):
    metadata.storage_data.pop(
        next(index for index in metadata.storage_data if index.offset is not None)
    )


def move(field, value, metadata):
    setattr(next(iter(metadata.storage_data.values())), field, value)


def resize(key, metadata):
    entry = metadata.state_dict_metadata[key]
    entry.size = torch.Size([entry.size[0] + 1, *entry.size[1:]])


def boxes(places, metadata):
    """Change the metadata: the embedding's one box becomes these ``(first row, rows)``."""
    key = next(
        key for key in metadata.state_dict_metadata if key.endswith("word_embeddings.weight")
    )
    entry = metadata.state_dict_metadata[key]
    (chunk,) = entry.chunks
    info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
    entry.chunks = [
        ChunkStorageMetadata(
            torch.Size([first, *chunk.offsets[1:]]), torch.Size([rows, *chunk.sizes[1:]])
        )
        for first, rows in places(entry.size[0])
    ]
    metadata.storage_data |= {MetadataIndex(key, each.offsets): info for each in entry.chunks}


def no_attribute(name, metadata):
    del next(iter(metadata.storage_data.values())).__dict__[name]


def stored(prefix=""):
    for length in (0, 1, 20, 0.5, 0.9, -1):
        yield f".metadata cut to {length}", partial(cut, ".metadata", length)
    for length in (0, 100, 0.5, 0.9):
        yield f"distcp cut to {length}", partial(cut, "__0_0.distcp", length)
    yield "distcp gone", lambda folder: (folder / "__0_0.distcp").unlink()
    yield (
        "distcp zeroed",
        lambda folder: write(
            "__0_0.distcp", bytes((folder / "__0_0.distcp").stat().st_size), folder
        ),
    )
    for file in (".metadata", "metadata.json"):
        yield f"{file} gone", lambda folder, f=file: (folder / f).unlink()
    for text in (b"", b"{}", b"[]", b'{"sharded_backend": "zarr"}', b"\xff"):
        yield f"metadata.json is {text!r}", partial(write, "metadata.json", text)
    for number, call in enumerate([None, (print, ("x",)), (eval, ("1",)), (Path, ("x",))]):
        yield f".metadata is evil {number}", partial(write, ".metadata", pickle.dumps(Evil(call)))
    for value in ([], {}, 1, None, "x"):
        yield f".metadata is {value!r}", partial(write, ".metadata", pickle.dumps(value))
    for name in ("../__0_0.distcp", "/etc/passwd", "", "..", "none.distcp", 3):
        yield f"storage in {name!r}", partial(edit_metadata, partial(point_to, name))
    for field, value in (("offset", 10**12), ("offset", -1), ("length", 10**12), ("length", -1)):
        yield f"storage {field}={value}", partial(edit_metadata, partial(move, field, value))
    for name, places in (
        ("overlap, so that the last rows are nowhere", lambda n: [(0, n - 20), (10, 20)]),
        ("are twice the same", lambda n: [(0, n // 2), (0, n - n // 2)]),
        ("end outside", lambda n: [(0, n - 5), (n - 4, 5)]),
        ("begin before 0", lambda n: [(-1, n)]),
    ):
        yield f"boxes {name}", partial(edit_metadata, partial(boxes, places))
    yield "storage without an offset", partial(edit_metadata, partial(no_attribute, "offset"))
    yield "chunk without a file", partial(edit_metadata, lose_file_entry)
    layer = f"{prefix}decoder.layers."
    for key in (
        f"{layer}self_attention.linear_qkv.weight",
        f"{layer}self_attention.linear_qkv.layer_norm_weight",
        f"{layer}mlp.linear_fc1.layer_norm_weight",
        f"{layer}mlp.linear_fc2.weight",
        f"{layer}self_attention.q_layernorm.weight",
        f"{prefix}decoder.final_layernorm.weight",
        f"{prefix}embedding.word_embeddings.weight",
        f"{prefix}output_layer.weight",
    ):
        yield f"{key} gone", partial(edit_metadata, partial(forget, key))
        yield f"{key} resized", partial(edit_metadata, partial(resize, key))


def megatron():
    yield from stored()
    yield from config_of("hf/config.json")


def all_of(kind):
    return list({"hf": hugging_face, "megatron": megatron}[kind]())
