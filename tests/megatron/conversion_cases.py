"""Converted checkpoints and megatron-core's own loader and saver, under many layouts; run on eight ranks."""

import queue
import shutil
from pathlib import Path

import megatron_cases as cases
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.checkpoint.compare import compare_stored
from spark_nemo.megatron.checkpoint.conversion import convert
from spark_nemo.megatron.checkpoint.stored import StoredCheckpoint
from spark_nemo.megatron.cpu_compat import cuda_means_cpu
from spark_nemo.megatron.distributed import gather_objects
from spark_nemo.megatron.hf_files import SafetensorsFolder
from spark_nemo.megatron.model_shape import read_hf_config
from spark_nemo.megatron.worker import MegatronWorker

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2))
METADATA = {"singleton_local_shards": False}  # megatron-core writes the layout's groups into it: always a copy


def layout(tp, pp, dtype="bfloat16", experts=False, distributed=False):
    return MegatronConfig(tensor_parallel=tp, pipeline_parallel=pp, data_parallel=8 // (tp * pp), dtype=dtype,
                          sequence_parallel=experts and tp > 1, distributed_optimizer=distributed)


def loaded_and_saved_by_core(hf, store, experts):
    """Of every layout: how many tensors differ, over all ranks, after megatron-core has loaded the conversion of
    ``hf``; and after it has saved the model and that was converted back."""
    converted, wrong = Path(store) / "converted", {}
    if dist.get_rank() == 0:
        convert(hf, converted, "megatron", dtype=torch.bfloat16)  # the copied config.json says float32
    dist.barrier()
    expected = dict(SafetensorsFolder(hf))
    for tp, pp in LAYOUTS:
        worker = MegatronWorker.from_config(read_hf_config(hf), layout(tp, pp, experts=experts), seed=9)
        saved, back = Path(store) / f"saved-{tp}-{pp}", Path(store) / f"back-{tp}-{pp}"
        with cuda_means_cpu():
            wanted = worker.model.sharded_state_dict(metadata=dict(METADATA))
            state = dist_checkpointing.load(wanted, str(converted), strict="raise_unexpected")
            worker.model.load_state_dict(state, strict=False)
            loaded = cases.export(worker)
            if dist.get_rank() == 0:
                saved.mkdir()
            dist.barrier()
            filesystem_async._results_queue = queue.Queue()  # instead of a process for it
            state = worker.model.sharded_state_dict(metadata=dict(METADATA))
            dist_checkpointing.save(state, str(saved), ("torch_dist", 1))
        count = sum(gather_objects(sum(not torch.equal(loaded[name], expected[name]) for name in expected)))
        if dist.get_rank() == 0:
            again = SafetensorsFolder(convert(saved, back, "hf", hf_config_from=hf).folder)
            count += sum(not torch.equal(again[name], expected[name]) for name in expected)
            assert set(again) == set(expected) == set(loaded)
        wrong[f"{tp}x{pp}"] = count
    return wrong


def optimizer_moves(hf, store):
    """How a training state differs, tensor by tensor, after it was saved under one layout, loaded under another and
    saved again: the found words of ``compare_stored``."""
    found = {}
    for distributed in (True, False):
        folder = Path(store) / f"optimizer-{distributed}"
        worker = MegatronWorker.from_hf(hf, layout(2, 1, distributed=distributed), seed=0, optimizer=cases.ADAM)
        for number in range(2):
            worker.train_step([cases.pack(cases.make_sequences(number)[worker.dp_rank::worker.dp_size])],
                              cases.loss_fn)
        first = worker.save_checkpoint(folder / "first", {})
        for tp, pp in ((1, 1), (1, 2), (2, 2), (4, 2)):
            other = MegatronWorker.from_config(worker.hf_config, layout(tp, pp, distributed=distributed), seed=7,
                                               optimizer=cases.ADAM)
            other.load_checkpoint(folder / "first")
            again = other.save_checkpoint(folder / f"{tp}x{pp}", {})
            dist.barrier()
            words = {x.found for x in compare_stored(StoredCheckpoint(first), StoredCheckpoint(again))}
            found[f"{tp}x{pp} {'distributed' if distributed else 'plain'}"] = sorted(words)
    return found


def eight_ranks(folders, store):
    """Every family's bfloat16 folder; rank 0's results count."""
    results = {}
    for family, folder in folders.items():
        scratch = Path(store) / f"core-{family}"
        results[family] = loaded_and_saved_by_core(Path(folder) / "bf16", scratch, family == "qwen3_moe")
    results["optimizer"] = optimizer_moves(Path(folders["qwen3"]) / "bf16", Path(store) / "moves")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(Path(store) / "moves")
    return results
