"""A stand-in for ``sgl_kernel`` in plain torch, for SGLang 0.5.21 on a CPU. Used by ``make
test-sglang`` only.

SGLang's own kernel package is a CUDA build. On a CPU without AMX its layers take their torch paths,
but two pieces of KV-cache bookkeeping are imported unconditionally: they are written here. **So in
the tests these two operations are ours, not SGLang's**; the scheduler, radix cache, sampler, model
code and HTTP layer are SGLang's own.
"""

import ctypes

import torch

__version__ = "0.4.7"

_SPECULATIVE = frozenset(
    {
        "assign_draft_cache_locs_contiguous_cpu",
        "assign_extend_cache_locs_cpu",
        "build_tree_kernel_efficient_cpu",
        "fill_accept_out_cache_loc_cpu",
        "fill_bonus_tokens_cpu",
        "rotate_input_ids_cpu",
        "verify_tree_greedy_cpu",
    }
)


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write new cache slots into the table of slots by request and position.

    ``req_to_token`` (requests, positions) gets, for request i, the columns
    ``start_offset[i]:end_offset[i]`` of row ``req_pool_indices[i]`` filled from ``out_cache_loc``,
    whose pieces follow one another in the order of requests.
    """
    lengths_N = (end_offset - start_offset).long()
    total = int(lengths_N.sum())
    rows_T = torch.repeat_interleave(req_pool_indices.long(), lengths_N)
    first_N = start_offset.long() - (lengths_N.cumsum(0) - lengths_N)
    columns_T = torch.arange(total) + torch.repeat_interleave(first_N, lengths_N)
    req_to_token[rows_T, columns_T] = out_cache_loc[:total].to(req_to_token.dtype)


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy rows ``src_loc`` to ``tgt_loc`` in every buffer, given by address and bytes per row;
    they may overlap.
    """
    if not len(src_loc):
        return
    source_N, target_N = src_loc.long(), tgt_loc.long()
    rows = int(torch.maximum(source_N.max(), target_N.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist()):
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        buffer_RS = torch.frombuffer(memory, dtype=torch.uint8).view(rows, stride)
        buffer_RS[target_N] = buffer_RS[
            source_N
        ]  # the right side is gathered before anything is written


def __getattr__(name: str) -> object:
    """Return a function that raises for the names that SGLang imports for speculative decoding."""
    if name not in _SPECULATIVE:
        raise AttributeError(f"sgl_kernel stand-in has no {name}")

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: the stand-in cannot decode speculatively")

    return refuse
