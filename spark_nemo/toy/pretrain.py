"""Pretrain the toy task's three base models with the project's own trainer.

Facts come first, in sequences of a handful of tokens; then clean text in every format; then, from
that common base, the habits of generator and verifier; the critic continues from the verifier.
Learning the same arithmetic in the long formats from the start takes ten times as many tokens.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.engines.tokenizer import Tokenizer
from spark_nemo.megatron.worker import MegatronWorker
from spark_nemo.toy.corpus import (
    CorpusExample,
    clean_corpus,
    drill_corpus,
    generator_corpus,
    verifier_corpus,
)
from spark_nemo.toy.critic import critic_corpus
from spark_nemo.toy.problem_files import held_out_questions
from spark_nemo.toy.train_tokenizer import train_tokenizer
from spark_nemo.training.fine_tuning import sft_loss
from spark_nemo.training.packing import TrainSequence, pack
from spark_nemo.utils.progress_bar import progress_bar

log = logging.getLogger(__name__)
LAYOUT = MegatronConfig(dtype="float32", distributed_optimizer=False, tokens_per_micro_batch=4096)
TOKENS_PER_STEP = 3200
STEPS = {"drill": 450, "clean": 900, "generator": 400, "verifier": 700, "critic": 1000}
LEARNING_RATE = {"drill": 3e-3, "clean": 3e-3, "generator": 1e-3, "verifier": 1e-3, "critic": 2e-3}
STARTS = {"clean": "drill", "generator": "clean", "verifier": "clean", "critic": "verifier"}
"""Phase whose weights each phase starts from; ``drill`` starts from random weights."""
BUILT = ("generator", "verifier", "critic")


def model_config(vocab_size: int) -> dict[str, object]:
    """Return the configuration of a Qwen2 of about 0.8 million parameters."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        # The usual 0.02 is for widths of thousands: at 128 the first layers get little signal and
        # learning starts late.
        "initializer_range": 0.07,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
    }


def build_models(out: Path, seed: int) -> None:
    """Write ``out/generator``, ``out/verifier`` and ``out/critic`` with a shared tokenizer.

    Finished phases are not run again, so an interrupted build resumes after its last phase.
    """
    held_out = held_out_questions()
    corpora = {
        "drill": drill_corpus(seed),
        "clean": clean_corpus(seed, held_out),
        "generator": generator_corpus(seed, held_out),
        "verifier": verifier_corpus(seed, held_out),
        "critic": critic_corpus(seed, held_out),
    }
    vocabulary = out / "vocabulary"

    def finished(phase: str) -> Path:
        folder = out / phase
        if not (folder / "config.json").exists():
            start = finished(STARTS[phase]) if phase in STARTS else vocabulary
            if start == vocabulary and not (vocabulary / "tokenizer.json").exists():
                train_tokenizer(_texts(corpora), 768, vocabulary)
            _pretrain(phase, corpora[phase], start, folder, seed)
        return folder

    for model in BUILT:
        finished(model)
    for folder in (vocabulary, out / "drill", out / "clean"):
        shutil.rmtree(folder, ignore_errors=True)


def _pretrain(
    phase: str, corpus: Iterator[CorpusExample], start: Path, out: Path, seed: int
) -> None:
    steps = STEPS[phase]
    tokenizer = Tokenizer.load(start)
    optimizer = OptimizerConfig(
        lr=LEARNING_RATE[phase],
        min_lr=LEARNING_RATE[phase] / 30,
        warmup_fraction=0.03,
        decay="cosine",
    )
    if (start / "config.json").exists():
        worker = MegatronWorker.from_hf(start, LAYOUT, seed, optimizer, steps)
    else:
        worker = MegatronWorker.from_config(
            model_config(tokenizer.vocab_size), LAYOUT, seed, optimizer, steps
        )
    bar = progress_bar(iterable=range(steps), desc=phase, unit="step")
    for _ in bar:
        batch = pack(_take(corpus, tokenizer), LAYOUT.tokens_per_micro_batch).micro_batches
        result = worker.train_step(batch, sft_loss)
        bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
    worker.save_hf(out, source_dir=start)


def _take(corpus: Iterator[CorpusExample], tokenizer: Tokenizer) -> list[TrainSequence]:
    """Take the next examples, about ``TOKENS_PER_STEP`` tokens."""
    sequences = []
    used = 0
    while used < TOKENS_PER_STEP:
        example = next(corpus)
        if example.messages:
            prompt = tokenizer.encode_chat(example.messages)
        else:
            prompt = tokenizer.encode(example.prefix)
        completion = tokenizer.encode(example.completion)
        sequence = TrainSequence(prompt, (*completion, *example.stop(tokenizer.eos_ids)))
        sequences.append(sequence)
        used += sequence.num_positions
    return sequences


def _texts(corpora: dict[str, Iterator[CorpusExample]]) -> list[str]:
    """Return a sample of the corpora, in random order, for the tokenizer."""
    texts = []
    for name in ("generator", "verifier"):
        for _ in range(6000):
            example = next(corpora[name])
            texts += [message["content"] for message in example.messages]
            texts.append(example.completion)
    random.Random(0).shuffle(texts)
    return [*texts, *["user", "assistant"] * 2000]
