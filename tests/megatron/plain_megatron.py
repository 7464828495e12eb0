"""A checkpoint written as any code based on megatron-core would: its public API, nothing of
spark_nemo.

    python plain_megatron.py FOLDER TENSOR_PARALLEL RANK PORT

A random bfloat16 GPTModel with Qwen2's settings and the stock local layers. Prints nothing.
"""

import os
import sys

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

SIZES = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}
VOCAB = 70


def main(folder, tp, rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=tp)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3, inference_rng_tracker=True, force_reset_rng=True)
    config = TransformerConfig(
        **SIZES,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        tensor_model_parallel_size=tp,
        params_dtype=torch.bfloat16,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=64,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    model = model.bfloat16()  # torch's norms are float32 otherwise
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # norms and biases would be 1 and 0; the same on all tensor ranks
            if parameter.dim() == 1 and not getattr(parameter, "tensor_model_parallel", False):
                parameter.add_(torch.linspace(0.1, 0.2, len(parameter)))
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *arguments: None  # the saver calls both whatever the device
        torch.cuda.current_device = lambda: torch.device("cpu")
    dist_checkpointing.save(model.sharded_state_dict(), folder, ("torch_dist", 1))
    if tp == 1:
        torch.save(model.state_dict(), os.path.join(folder, "plain.pt"))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
