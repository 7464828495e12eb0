"""Optimizer state that is saved under one layout, loaded and saved under another, and moved back;
run on four ranks.
"""

import json
from pathlib import Path

import megatron_cases as cases
import torch.distributed as dist

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.checkpoint import training_checkpoint
from spark_nemo.megatron.checkpoint.compare_tensors import compare_stored
from spark_nemo.megatron.checkpoint.torch_dist_reader import StoredCheckpoint
from spark_nemo.megatron.process_groups import gather_objects
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.models.hf_config import read_hf_config

HOME = (2, 1)
LAYOUTS = {f"tp{tp}_pp{pp}": (tp, pp) for tp, pp in ((1, 1), (1, 2), (2, 2), (4, 1))}


def layout(tp, pp, distributed):
    return MegatronConfig(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=4 // (tp * pp),
        dtype="bfloat16",
        distributed_optimizer=distributed,
    )


def saved_again(hf, source, target, tp, pp, distributed):
    """The training state in ``source``, loaded and saved under TP ``tp`` x PP ``pp``; and whether
    buckets had padding before the last on any rank, behind which state was once saved shifted.
    """
    worker = MegatronWorker.from_config(
        read_hf_config(hf), layout(tp, pp, distributed), seed=7, optimizer=cases.ADAM
    )
    worker.load_checkpoint(source)
    worker.save_checkpoint(target, {})
    dist.barrier()
    buffers = [
        buffer
        for part in worker._optimizer.chained_optimizers
        for buffer in getattr(part, "buffers", ())
    ]
    padded = any(
        bucket.numel_unpadded < bucket.grad_data.numel()
        for buffer in buffers
        for bucket in buffer.buckets[:-1]
    )
    return any(gather_objects(padded))


def stored(folder):
    return StoredCheckpoint(folder / (folder / "latest").read_text())


def moves(hf, store, distributed):
    """Two steps under ``HOME``; then, for every other layout, what differs there and after the way
    back.
    """
    store = Path(store) / str(distributed)
    worker = MegatronWorker.from_hf(hf, layout(*HOME, distributed), seed=0, optimizer=cases.ADAM)
    for number in range(2):
        worker.train_step(
            [cases.pack(cases.make_sequences(number)[worker.dp_rank :: worker.dp_size])],
            cases.loss_fn,
        )
    worker.save_checkpoint(store / "home", {})
    gathered = training_checkpoint.sharded_state(worker.model, worker._optimizer, loading=False)[
        "optimizer"
    ].get("param_state")
    results = {
        "holders": [
            rank for rank, held in gather_objects((worker.dp_rank, gathered is not None)) if held
        ]
    }
    for name, (tp, pp) in LAYOUTS.items():
        padded = saved_again(hf, store / "home", store / name, tp, pp, distributed)
        saved_again(hf, store / name, store / f"{name}-home", *HOME, distributed)
        if dist.get_rank() == 0:
            first, there, back = (stored(store / x) for x in ("home", name, f"{name}-home"))
            results[name] = {
                "padded": padded,
                "states": sum("exp_avg" in x for x in first.tensors),
                "there": {
                    x.name: x.found for x in compare_stored(first, there) if x.found != "same"
                },
                "back": {x.name: x.found for x in compare_stored(first, back) if x.found != "same"},
            }
    return results


def four_ranks(hf, store):
    """Rank 0 writes what both optimizers gave."""
    results = {kind: moves(hf, store, kind == "distributed") for kind in ("distributed", "plain")}
    if dist.get_rank() == 0:
        (Path(store) / "results.json").write_text(json.dumps(results))
