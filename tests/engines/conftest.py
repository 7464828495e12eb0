"""A tiny Qwen2 by transformers with random biases and norms, and a small byte-level tokenizer, both
in folders.
"""

import json
import random

import pytest
from engine_cases import CONTEXT, TEMPLATE, VOCAB, make_model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from spark_nemo.engines.local import LocalEngine


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def any_model(request, tmp_path_factory):
    model = make_model(0, request.param)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="session")
def model():
    return make_model(0, tied=True)


@pytest.fixture(scope="session")
def other_model():
    return make_model(1, tied=True)


@pytest.fixture(scope="session")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(folder):
    return LocalEngine.from_folder(folder, max_batch_size=8, max_context=CONTEXT)


@pytest.fixture(scope="session")
def prompts() -> list[tuple[int, ...]]:
    """Twelve prompts of 1 to 40 tokens."""
    draw = random.Random(0)
    lengths = (1, 2, 40, 3, 17, 31, 32, 33, 5, 8, 21, 1)
    return [tuple(draw.randrange(VOCAB) for _ in range(length)) for length in lengths]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [
        "Step 1: 3 + 4 = 7, so the answer is \\boxed{7}.",
        "naïve café – 数学 ∑ x² 😀",
        "the sum of two numbers",
    ]
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.add_tokens(["<step>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",
                "chat_template": TEMPLATE,
            }
        )
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [backend.token_to_id("<|im_end|>"), 5]})
    )
    return folder
