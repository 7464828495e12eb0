"""A fake SGLang server that really receives weights: ``python receiver.py --port P``.

It extends ``tests/engines/fake_sglang.py``: it reads safetensors with the safetensors library, joins
process groups as SGLang does, maps shared tensors, fuses q/k/v and gate/up by concatenation, stacks
experts, and hashes its parameters.
``tricks`` (POST /_faults) make it misbehave.
"""

import argparse
import asyncio
import base64
import hashlib
import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
from fake_sglang import FakeSglang, _success


class Receiver(FakeSglang):
    """``weights`` maps Hugging Face names to the tensors received last."""

    def __init__(self, **more):
        super().__init__(**more)
        self.weights = {}
        self.joined = {}
        self.tricks = {}
        self.received = 0

    async def set_faults(self, request):
        self.tricks, self.received = request["body"], 0
        return _success()

    def take(self, named):
        for name, tensor in named:
            tensor = tensor.clone()
            if name == self.tricks.get("corrupt"):
                tensor.view(-1)[0] += 1
            self.weights[name] = tensor

    async def update_weights_from_disk(self, request):
        reply = await super().update_weights_from_disk(request)
        for path in sorted(Path(request["body"]["model_path"]).glob("*.safetensors")):
            self.take(load_file(path).items())
        return reply

    async def update_weights_from_tensor(self, request):
        reply = await super().update_weights_from_tensor(request)
        if reply.status == 200:
            self.take(
                pickle.loads(base64.b64decode(request["body"]["serialized_named_tensors"][0]))
            )
        return reply

    async def init_weights_update_group(self, request):
        if self.tricks.get("never_join"):
            await asyncio.sleep(3600)
        body = request["body"]

        def join():
            url = f"tcp://{body['master_address']}:{body['master_port']}"
            store, rank, size = next(c10d.rendezvous(url, body["rank_offset"], body["world_size"]))
            group, _ = c10d._new_process_group_helper(
                size,
                rank,
                [],
                c10d.Backend(body["backend"]),
                c10d.PrefixStore(body["group_name"], store),
                group_name=body["group_name"],
                timeout=timedelta(seconds=30),
            )
            c10d._world.pg_group_ranks[group] = {index: index for index in range(size)}
            self.joined[body["group_name"]] = group

        await asyncio.to_thread(join)
        return await super().init_weights_update_group(request)

    async def update_weights_from_distributed(self, request):
        body = request["body"]
        if self.tricks.get("reject"):
            return _success("rejected by trick", False)
        self.received += 1
        if self.received == self.tricks.get("die_at"):
            os._exit(1)
        reply = await super().update_weights_from_distributed(request)
        if reply.status == 200:
            assert body["load_format"] == "flattened_bucket"
            dtypes = [getattr(torch, name) for name in body["dtypes"]]
            sizes = [
                torch.Size(shape).numel() * dtype.itemsize
                for shape, dtype in zip(body["shapes"], dtypes)
            ]
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            await asyncio.to_thread(dist.broadcast, flat, 0, self.joined[body["group_name"]])
            self.take(
                (name, part.view(dtype).view(shape))
                for name, part, dtype, shape in zip(
                    body["names"], flat.split(sizes), dtypes, body["shapes"]
                )
            )
        return reply

    def parameters(self):
        """SGLang's fused parameters of one rank, the vocabulary padded to a multiple of 64."""
        w = self.weights
        for name, tensor in w.items():
            stem, _, which = name.partition(".experts.")
            if which == "0.gate_proj.weight":
                each = [
                    [w[f"{stem}.experts.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")]
                    for e in range(w[f"{stem}.gate.weight"].shape[0])
                ]
                yield (
                    f"{stem}.experts.w13_weight",
                    torch.stack([torch.cat(one[:2]) for one in each]),
                )
                yield f"{stem}.experts.w2_weight", torch.stack([one[2] for one in each])
            elif which:
                continue
            elif ".q_proj." in name:
                parts = [w[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                yield name.replace("q_proj", "qkv_proj"), torch.cat(parts)
            elif ".gate_proj." in name:
                yield (
                    name.replace("gate_proj", "gate_up_proj"),
                    torch.cat([tensor, w[name.replace("gate", "up")]]),
                )
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                yield name, torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
            elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
                yield name, tensor

    async def weights_checker(self, request):
        if self.tricks.get("no_checksums"):
            return await super().weights_checker(request)
        checksums = {
            name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
            for name, tensor in self.parameters()
        }
        return _success(ranks=[{"checksums": checksums}])


async def serve(port):
    # SGLang has a default group of its own, too.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    await Receiver(on_death=lambda: os._exit(1)).start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    asyncio.run(serve(parser.parse_args().port))
