"""One process in the place of any rank of a large layout: a fake process group, and modules on the
meta device.
"""

import contextlib

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from spark_nemo.megatron.cpu_compat import cuda_means_cpu, seed_everything
from spark_nemo.megatron.packed_gpt import construct


@contextlib.contextmanager
def as_rank(layout, rank):
    """Be global rank ``rank`` of ``layout``. Nothing is communicated. Groups of a world of one are
    given up.
    """
    _leave()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    with cuda_means_cpu():
        parallel_state.initialize_model_parallel(
            layout.tensor_parallel,
            layout.pipeline_parallel,
            expert_model_parallel_size=layout.expert_parallel,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
    try:
        yield
    finally:
        _leave()


def _leave():
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        assert dist.get_backend() == "fake" or dist.get_world_size() == 1
        dist.destroy_process_group()


def built_parameters(shape, layout, rank):
    """Names and shapes of what the module of a rank really has, and its (tensor, pipeline)
    position.
    """
    with as_rank(layout, rank), torch.device("meta"):
        seed_everything(0)
        model = construct(shape, layout)
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        return place, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
