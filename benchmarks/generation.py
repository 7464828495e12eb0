"""Tokens per second of the embedded engine and of ``transformers.generate``, side by side on the
same weights.

    OMP_NUM_THREADS=1 python benchmarks/generation.py

What is compared: the same random Qwen2 (float32, CPU, one thread), the same prompts of mixed
length, sampling at temperature 1 without top-p/top-k, the same stop tokens (drawn so that responses
end at random) and length limit, and a log-probability for every token from both. Only sampled
tokens up to and including the stop token count.

What differs, on purpose, because it is how each is used: the engine batches continuously and fills
a row as soon as it is free; ``generate`` gets left-padded batches of ``--hf-batch`` in the order
given and runs each until its last row is done, and its log-probabilities are log_softmax of
``output_logits`` afterwards. Prompts are all different, so the engine gains nothing from prefix
sharing unless ``--group`` > 1. Repeats alternate (A B A B) and the median is printed; on a shared
machine trust the ratio by processor time more than anything measured by the wall. A model this
small measures overhead per token as much as arithmetic, and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from serve_batch import generate_all
from transformers import Qwen2Config, Qwen2ForCausalLM, logging

from spark_nemo.engines import GenerationRequest, SamplingParams, run_async
from spark_nemo.engines.local import LocalEngine


def options() -> argparse.Namespace:
    """The defaults are the toy task's model and lengths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {
        "hidden": 128,
        "layers": 4,
        "heads": 4,
        "kv-heads": 2,
        "ffn": 320,
        "vocab": 400,
        "requests": 768,
        "batch": 256,
        "hf-batch": 64,
        "group": 1,
        "prompt-min": 20,
        "prompt-max": 80,
        "max-new": 120,
        "stop-tokens": 5,
        "repeats": 3,
        "seed": 0,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="nucleus of both sides; default 1 (off)"
    )
    return parser.parse_args()


def build_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    """Random weights: their next-token distribution is nearly flat, so stops are random."""
    torch.manual_seed(args.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            intermediate_size=args.ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            tie_word_embeddings=True,
            max_position_embeddings=args.prompt_max + args.max_new,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()


def build_requests(args: argparse.Namespace) -> list[GenerationRequest]:
    """Prompts avoid id 0, which pads on transformers' side."""
    draw = torch.Generator().manual_seed(args.seed)
    stops = tuple(range(1, args.stop_tokens + 1))
    prompts = []
    while len(prompts) < args.requests:
        length = int(torch.randint(args.prompt_min, args.prompt_max + 1, (1,), generator=draw))
        prompts += [
            tuple(torch.randint(1, args.vocab, (length,), generator=draw).tolist())
        ] * args.group
    return [
        GenerationRequest(
            prompt, SamplingParams(args.max_new, top_p=args.top_p, stop_token_ids=stops, seed=n)
        )
        for n, prompt in enumerate(prompts[: args.requests])
    ]


def with_transformers(
    model: Qwen2ForCausalLM, requests: Sequence[GenerationRequest], batch: int
) -> int:
    """Serve in fixed left-padded batches with log-probabilities; tokens up to and including the
    stop token.
    """
    total = 0
    sampling = requests[0].sampling
    for start in range(0, len(requests), batch):
        prompts = [request.prompt_ids for request in requests[start : start + batch]]
        width = max(map(len, prompts))
        ids_BT = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts])
        with torch.inference_mode():
            out = model.generate(
                ids_BT,
                attention_mask=(ids_BT != 0).long(),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=sampling.top_p,
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=0,
                eos_token_id=list(sampling.stop_token_ids),
                output_logits=True,
                return_dict_in_generate=True,
            )
            response_BT = out.sequences[:, width:]
            logp_BTV = torch.log_softmax(torch.stack(out.logits, dim=1), dim=-1)
            logprobs_BT = logp_BTV.gather(2, response_BT.unsqueeze(2)).squeeze(2)
        stopped_BT = torch.isin(response_BT, torch.tensor(sampling.stop_token_ids))
        counted_BT = stopped_BT.int().cumsum(1) - stopped_BT.int() == 0
        total += int((counted_BT & logprobs_BT.isfinite()).sum())
    return total


def with_engine(engine: LocalEngine, requests: Sequence[GenerationRequest]) -> int:
    """Serve everything at once; the engine keeps its rows filled."""
    return sum(len(result.logprobs) for result in run_async(generate_all(engine, requests)))


def rate(serve: Callable[[], int]) -> tuple[float, float]:
    """Tokens per second of wall time, and of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    tokens = serve()
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - processor)


def main() -> None:
    """Print one line per repeat and the medians."""
    args = options()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, requests = build_model(args), build_requests(args)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine, engine_small = (
            LocalEngine.from_folder(
                folder, max_batch_size=batch, max_context=args.prompt_max + args.max_new
            )
            for batch in (args.batch, args.hf_batch)
        )
    contenders = {
        f"LocalEngine, {args.batch} rows": lambda: with_engine(engine, requests),
        f"LocalEngine, {args.hf_batch} rows": lambda: with_engine(engine_small, requests),
        f"transformers generate, batch {args.hf_batch}": lambda: with_transformers(
            model, requests, args.hf_batch
        ),
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters} parameters, {len(requests)} requests, float32, 1 thread; "
        "tokens/s (tokens per cpu-second)"
    )
    with_transformers(model, requests[: args.hf_batch], args.hf_batch)
    with_engine(engine, requests[: args.hf_batch])
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for repeat in range(args.repeats):
        for name, serve in contenders.items():
            rates[name].append(rate(serve))
            wall, processor = rates[name][-1]
            print(f"  repeat {repeat + 1}  {name:36s} {wall:8.0f} ({processor:.0f})", flush=True)
    medians = {
        name: [statistics.median(column) for column in zip(*values)]
        for name, values in rates.items()
    }
    base_wall, base_processor = list(medians.values())[-1]
    for name, (wall, processor) in medians.items():
        print(
            f"median    {name:36s} {wall:8.0f} ({processor:.0f})   "
            f"{wall / base_wall:.2f}x by wall time, "
            f"{processor / base_processor:.2f}x by processor time"
        )


if __name__ == "__main__":
    main()
