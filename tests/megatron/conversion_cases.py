"""Converted checkpoints and megatron-core's own loader and saver, under many layouts; run on eight
ranks.
"""

import json
import queue
from pathlib import Path

import megatron_cases as cases
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from spark_nemo.config import MegatronConfig
from spark_nemo.megatron.checkpoint.conversion import convert
from spark_nemo.megatron.cpu_compat import cuda_means_cpu
from spark_nemo.megatron.hf_files import SafetensorsFolder
from spark_nemo.megatron.process_groups import gather_objects, initialize
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.models.hf_config import read_hf_config

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 2))
METADATA = {
    "singleton_local_shards": False
}  # megatron-core writes the layout's groups into it: always a copy


def layout(tp, pp, experts):
    return MegatronConfig(
        tensor_parallel=tp,
        pipeline_parallel=pp,
        data_parallel=8 // (tp * pp),
        dtype="bfloat16",
        sequence_parallel=experts and tp > 1,
        distributed_optimizer=False,
    )


def converted(hf, store):
    """``hf`` as a Megatron folder, made by rank 0."""
    if dist.get_rank() == 0:
        # dtype: the copied config.json says float32.
        convert(hf, Path(store) / "converted", "megatron", dtype=torch.bfloat16)
    dist.barrier()


def loaded_and_saved_by_core(hf, store, tp, pp, experts):
    """Count differing tensors over all ranks after megatron-core has loaded the conversion of
    ``hf``, and after its own checkpoint of the model was converted back.
    """
    expected = dict(SafetensorsFolder(hf))
    worker = MegatronWorker.from_config(read_hf_config(hf), layout(tp, pp, experts), seed=9)
    saved, back = Path(store) / f"saved-{tp}-{pp}", Path(store) / f"back-{tp}-{pp}"
    with cuda_means_cpu():
        wanted = worker.model.sharded_state_dict(metadata=dict(METADATA))
        state = dist_checkpointing.load(
            wanted, str(Path(store) / "converted"), strict="raise_unexpected"
        )
        worker.model.load_state_dict(state, strict=False)
        loaded = cases.export(worker)
        if dist.get_rank() == 0:
            saved.mkdir()
        dist.barrier()
        filesystem_async._results_queue = queue.Queue()  # instead of a process for it
        state = worker.model.sharded_state_dict(metadata=dict(METADATA))
        dist_checkpointing.save(state, str(saved), ("torch_dist", 1))
    count = sum(
        gather_objects(sum(not torch.equal(loaded[name], expected[name]) for name in expected))
    )
    if dist.get_rank() == 0:
        again = SafetensorsFolder(convert(saved, back, "hf", hf_config_from=hf).folder)
        count += sum(not torch.equal(again[name], expected[name]) for name in expected)
        assert set(again) == set(expected) == set(loaded)
    return count


def eight_ranks(folders, store):
    """Every family's bfloat16 folder; rank 0 writes what counts. Layout by layout: new groups are
    what costs here.
    """
    folders = {family: Path(folder) / "bf16" for family, folder in folders.items()}
    scratch = {family: Path(store) / f"core-{family}" for family in folders}
    results = {family: {} for family in folders}
    initialize(layout(*LAYOUTS[0], experts=False))
    for family in folders:
        converted(folders[family], scratch[family])
    for tp, pp in LAYOUTS:
        name = f"{tp}x{pp}"
        for family in folders:
            results[family][name] = loaded_and_saved_by_core(
                folders[family], scratch[family], tp, pp, family == "qwen3_moe"
            )
    if dist.get_rank() == 0:
        (Path(store) / "conversion.json").write_text(json.dumps(results))
