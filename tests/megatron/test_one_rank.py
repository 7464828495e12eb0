"""One process: parity with transformers, packing, log-probabilities, checkpoints, files and error
messages.

Nothing here runs on a GPU or with Transformer Engine.
"""

import json
import math
import shutil

import megatron_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from spark_nemo.config import MegatronConfig, OptimizerConfig
from spark_nemo.config.errors import ConfigError
from spark_nemo.megatron import hf_files
from spark_nemo.megatron.attention import PackedRows, packed_causal_attention
from spark_nemo.megatron.checkpoint import newest
from spark_nemo.megatron.layer_spec import table_length
from spark_nemo.megatron.logprobs import vocab_parallel_logprobs
from spark_nemo.megatron.optimizer import NonFiniteGradient
from spark_nemo.megatron.packed_batch import PackedBatch
from spark_nemo.megatron.worker import MegatronWorker

pytestmark = pytest.mark.slow

ONE = MegatronConfig(dtype="float32", distributed_optimizer=False)
ONE_DISTRIBUTED = MegatronConfig(dtype="float32", distributed_optimizer=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders with transformers' numbers, tied and untied."""
    torch.set_num_threads(1)
    folders = {tied: tmp_path_factory.mktemp(f"tied_{tied}") for tied in (True, False)}
    for tied, folder in folders.items():
        cases.write_reference(folder, tied)
    return folders


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", [ONE, ONE_DISTRIBUTED], ids=["plain", "distributed_optimizer"])
def test_equals_transformers(folders, tied, layout):
    """Log-probabilities, loss, gradients and 5 AdamW steps (with clipping and decay) equal
    transformers and torch, and the export equals the file bit for bit. float32 only; transformers
    runs the sequences one by one, we run packs.
    """
    result = cases.compare(folders[tied], layout, per_batch=10 if tied else 3)
    assert result["logprobs"] <= 1e-4 and result["export"] == 0
    assert all(
        result[name] <= 1e-5 for name in ("loss", "grads", "grad_norm", "adam") if name in result
    ), result


def test_packed_equals_one_by_one(folders):
    """A pack of ten sequences gives each the log-probabilities that it gets alone: nothing leaks
    between them.
    """
    worker, sequences = MegatronWorker.from_hf(folders[True], ONE, seed=0), cases.make_sequences()
    (packed,) = worker.logprobs([cases.pack(sequences)])
    alone = torch.cat(worker.logprobs([cases.pack([s]) for s in sequences]))
    mask = torch.cat([s.mask for s in sequences]) > 0
    assert (packed - alone)[mask].abs().max() <= 1e-5


def test_same_input_gives_the_same_bits(folders):
    """Two runs of three steps in one process end in identical weights. One thread; says nothing
    about GPUs.
    """

    def run():
        worker = MegatronWorker.from_hf(folders[True], ONE, seed=0, optimizer=cases.ADAM)
        for seed in range(3):
            worker.train_step([cases.pack(cases.make_sequences(seed))], cases.loss_fn)
        return cases.export(worker)

    assert cases.max_difference(run(), run()) == 0


@pytest.mark.parametrize("lengths", [(5, 5, 5), (1,), (3, 40, 7, 1, 1, 22, 40, 38)])
def test_packed_attention_equals_a_block_mask(lengths):
    """Bucketed attention and its gradients equal one softmax under a block-diagonal causal mask,
    with grouped queries. Covers packs of one block (no gather) and of several.
    """
    T, H, G, D = sum(lengths), 4, 2, 8
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(T, heads, D, dtype=torch.float64, requires_grad=True) for heads in (H, G, G)
    )
    rows = PackedRows.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0).int())
    out = packed_causal_attention(q, k, v, rows)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None]) & torch.ones(T, T, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / math.sqrt(D)
    probabilities = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", probabilities, v.repeat_interleave(2, 1))
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(out, expected)


def test_few_tables_of_rotary_angles_hold_every_length():
    """Megatron keeps a table per length it was asked for on the GPU: up to 32k tokens there are 16,
    half of the memory in the longest. Only Transformer Engine's layers, which do not run here, are
    given such tables.
    """
    lengths = {n: table_length(n) for n in range(1, 32769)}
    assert all(n <= length < 2 * n for n, length in lengths.items())
    assert len(set(lengths.values())) == 16 and sum(set(lengths.values())) < 2 * 32768


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_chunked_logprobs_equal_log_softmax(temperature, chunk_rows):
    """Log-probabilities, entropy and both gradients equal torch's log_softmax in any chunking;
    padded rows of the vocabulary take no part, and a label of -100 is harmless.
    """
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (20, 12))
    labels, real = torch.randint(0, 11, (20,)), 11
    labels[3] = -100
    coefficients = torch.randn(20) * (labels >= 0)
    ours, entropy = vocab_parallel_logprobs(
        hidden, weight, labels, real, temperature, with_entropy=True, chunk_rows=chunk_rows
    )
    full = (hidden @ weight[:real].T / temperature).log_softmax(-1)
    theirs = full.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    used = labels >= 0
    torch.testing.assert_close(ours[used], theirs.float()[used])
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1).float())
    for mine, other in zip(
        torch.autograd.grad((ours * coefficients).sum(), (hidden, weight)),
        torch.autograd.grad((theirs * coefficients).sum(), (hidden, weight)),
    ):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_entropy_is_given_when_asked_for(folders):
    """The loss function sees an entropy between 0 and log V, without gradient, exactly when it asks
    for one.
    """
    worker, seen = MegatronWorker.from_hf(folders[True], ONE, seed=0, optimizer=cases.ADAM), []
    batch = cases.pack(cases.make_sequences())

    def loss_fn(logprobs_T, entropy_T, batch):
        seen.append(entropy_T)
        return cases.loss_fn(logprobs_T, entropy_T, batch)

    worker.train_step([batch], loss_fn)
    worker.train_step([batch], loss_fn, with_entropy=True)
    assert seen[0] is None and not seen[1].requires_grad
    assert float(seen[1].min()) > 0 and float(seen[1].max()) <= math.log(cases.VOCAB)


@pytest.mark.parametrize(
    "layout",
    [
        ONE,
        ONE_DISTRIBUTED,
        MegatronConfig(distributed_optimizer=False),
        MegatronConfig(distributed_optimizer=True),
    ],
    ids=["float32", "float32_distributed", "bfloat16", "bfloat16_distributed"],
)
def test_checkpoint_resumes_exactly(folders, tmp_path, layout):
    """Losses, gradient norms and learning rates after loading are bit-identical to those without
    the interruption, for both optimizers and both number formats, in the middle of warm-up and
    decay.
    """
    settings = OptimizerConfig(lr=1e-3, warmup_fraction=0.5, decay="cosine")
    expected, resumed = cases.resume(folders[True], tmp_path, layout, [layout], settings)
    assert resumed == [expected]


def test_newest_checkpoint_is_the_one_named(folders, tmp_path):
    """``latest`` names the last save, older folders than ``keep`` go, and a half-written one is
    never read.
    """
    worker = MegatronWorker.from_hf(folders[True], ONE, seed=0, optimizer=cases.ADAM)
    for number in range(3):
        worker.train_step([cases.pack(cases.make_sequences(number))], cases.loss_fn)
        worker.save_checkpoint(tmp_path, {"number": number}, keep=2)
    (tmp_path / ".step-00000009.tmp").mkdir()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".step-00000009.tmp", "latest", "step-00000002", "step-00000003"]
    assert worker.load_checkpoint(tmp_path) == {"number": 2} and worker.step == 3


def test_a_checkpoint_that_was_deleted_by_hand_is_named(folders, tmp_path):
    """``latest`` names a step that is not there: one line with both, wherever the newest checkpoint
    is looked for, and never a step that is left of older ones.
    """
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "latest").write_text("step-00000003")
    worker = MegatronWorker.from_hf(folders[True], ONE, seed=0, optimizer=cases.ADAM)
    for look in (newest, worker.load_checkpoint):
        with pytest.raises(
            ConfigError, match=r"latest names 'step-00000003', which is not a folder"
        ):
            look(tmp_path)


@pytest.mark.parametrize(
    "layout", [ONE, ONE_DISTRIBUTED, MegatronConfig()], ids=["plain", "distributed", "bfloat16"]
)
def test_borrowed_weights_are_given_back(folders, layout):
    """Under ``use_weights`` the old weights' log-probabilities come back bit for bit; afterwards,
    also after an error, so do the trained weights, and training goes on as if nothing had happened.
    """
    batch = cases.pack(cases.make_sequences())
    worker = MegatronWorker.from_hf(folders[False], layout, seed=0, optimizer=cases.ADAM)
    twin = MegatronWorker.from_hf(folders[False], layout, seed=0, optimizer=cases.ADAM)
    before, reference = worker.logprobs([batch])[0], worker.snapshot()
    for each in (worker, twin):
        each.train_step([batch], cases.loss_fn)
    trained = cases.export(worker)
    with pytest.raises(RuntimeError, match="borrowed"), worker.use_weights(reference):
        assert torch.equal(worker.logprobs([batch])[0], before)
        worker.train_step([batch], cases.loss_fn)
    assert cases.max_difference(cases.export(worker), trained) == 0
    assert worker.train_step([batch], cases.loss_fn) == twin.train_step([batch], cases.loss_fn)


def test_nan_never_reaches_the_weights(folders):
    """A NaN in the loss raises, names the step, and leaves weights and schedule as they were;
    training can go on.
    """
    worker = MegatronWorker.from_hf(folders[True], ONE, seed=0, optimizer=cases.ADAM)
    batch, before = cases.pack(cases.make_sequences()), cases.export(worker)
    with pytest.raises(NonFiniteGradient, match=r"optimizer step 0: gradient norm is nan"):
        worker.train_step(
            [batch], lambda logprobs, entropy, batch: ((logprobs * math.nan).sum(), {})
        )
    assert cases.max_difference(cases.export(worker), before) == 0 and worker.step == 0
    assert math.isfinite(worker.train_step([batch], cases.loss_fn).loss)


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_summed_in_bfloat16(folders, distributed):
    """Ten micro-batches summed in bfloat16 buffers give the float32 sum to bfloat16's precision (3
    decimal digits), not its bits, and five steps of training the same losses within 1 %. The
    weights are bfloat16 both times; what rounding does to a long training is not shown. Without
    clipping, which would scale the float32 buffers in place.
    """

    def run(gradients):
        layout = MegatronConfig(grad_reduce_dtype=gradients, distributed_optimizer=distributed)
        worker = MegatronWorker.from_hf(folders[True], layout, seed=0, optimizer=cases.NO_CLIP)
        batches = [cases.pack([sequence]) for sequence in cases.make_sequences()]
        losses = [worker.train_step(batches, cases.loss_fn).loss]
        buffers = [buffer.grad_data.clone() for buffer in worker._trained.buffers]
        return buffers, losses + [worker.train_step(batches, cases.loss_fn).loss for _ in range(4)]

    (exact, losses), (rounded, close) = run("float32"), run("bfloat16")
    assert {buffer.dtype for buffer in exact} == {torch.float32} and {x.dtype for x in rounded} == {
        torch.bfloat16
    }
    exact_E, rounded_E = torch.cat(exact), torch.cat(rounded).float()
    assert 0 < (exact_E - rounded_E).norm() <= 0.01 * exact_E.norm()
    assert losses[-1] < losses[0] and close == pytest.approx(losses, rel=0.01)


def test_schedule_warms_up_and_decays(folders):
    """Warm-up rises linearly from above zero to lr, linear decay then falls to min_lr."""
    settings = OptimizerConfig(lr=1.0, warmup_fraction=0.25, decay="linear", min_lr=0.1)
    worker = MegatronWorker.from_hf(folders[True], ONE, seed=0, optimizer=settings, total_steps=8)
    batch = cases.pack(cases.make_sequences()[:2])
    rates = [worker.train_step([batch], lambda *args: (args[0].sum() * 0, {})).lr for _ in range(8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.85, 0.7, 0.55, 0.4, 0.25])


def test_saved_model_is_one_transformers_can_use(folders, tmp_path):
    """save_hf writes what it read, bit for bit, with the tokenizer's files; transformers loads it
    and agrees. In several shards the folder reads back the same.
    """
    from transformers import AutoModelForCausalLM

    shutil.copytree(folders[False], tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    worker = MegatronWorker.from_hf(tmp_path / "source", ONE, seed=0)
    worker.save_hf(tmp_path / "saved", source_dir=tmp_path / "source")
    worker.save_hf(tmp_path / "saved", source_dir=tmp_path / "source")  # over an old one
    original = load_file(tmp_path / "source" / "model.safetensors")
    assert cases.max_difference(load_file(tmp_path / "saved" / "model.safetensors"), original) == 0
    assert (tmp_path / "saved" / "tokenizer.json").exists() and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["saved", "source"]
    model, sequence = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        cases.make_sequences()[2],
    )
    ours, theirs = worker.logprobs([cases.pack([sequence])])[0], cases.hf_logprobs(model, sequence)
    assert (ours - theirs)[sequence.mask > 0].abs().max() <= 1e-4

    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    (tmp_path / "shards").mkdir()
    hf_files.write_tensors(
        tmp_path / "shards", original.items(), shapes, torch.float32, max_bytes=50_000
    )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert (
        cases.max_difference(hf_files.SafetensorsFolder(tmp_path / "shards").items(), original) == 0
    )


def test_new_model_depends_on_the_seed_only(tmp_path, folders):
    """from_config with one seed gives one model, another seed another; norms start at 1 and biases
    at 0.
    """
    config = json.loads((folders[True] / "config.json").read_text())
    one, same, other = (
        cases.export(MegatronWorker.from_config(config, ONE, seed=s)) for s in (1, 1, 2)
    )
    assert cases.max_difference(one, same) == 0 and cases.max_difference(one, other) > 0
    assert (
        one["model.norm.weight"].eq(1).all()
        and one["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.2.self_attn.k_proj.bias"),
            "lacks tensor model.layers.2.self_attn.k_proj.bias",
        ),
        (
            lambda t: t.pop("model.layers.1.input_layernorm.weight"),
            "lacks tensor model.layers.1.input_layernorm.weight",
        ),
        (
            lambda t: t.update({"model.extra": torch.zeros(1)}),
            "has tensor model.extra, which the model does not have",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight in .* has shape \(3,\), config",
        ),
    ],
    ids=["missing", "missing_norm", "surplus", "shape"],
)
def test_wrong_tensors_are_named(folders, tmp_path, change, message):
    """A missing, surplus or misshapen tensor stops the load with its name; nothing is left at a
    default.
    """
    shutil.copy(folders[True] / "config.json", tmp_path)
    tensors = load_file(folders[True] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        MegatronWorker.from_hf(tmp_path, ONE, seed=0)


def test_wrong_settings_are_named(folders, tmp_path):
    """Missing folders and files, unknown models, and a wrong number of ranks are one-line errors
    with the fix.
    """

    def error_of(folder, layout=ONE):
        with pytest.raises(ConfigError) as caught:
            MegatronWorker.from_hf(folder, layout, seed=0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert error_of(tmp_path / "none").startswith(
        f"model folder {tmp_path / 'none'} does not exist"
    )
    assert error_of(tmp_path).startswith(f"model folder {tmp_path} has no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type='gpt2' is not supported" in error_of(tmp_path)
    shutil.copy(folders[True] / "config.json", tmp_path)
    assert ".safetensors" in error_of(tmp_path)
    assert "torchrun --nproc-per-node 4" in error_of(folders[True], MegatronConfig(data_parallel=4))


def test_layouts_that_do_not_divide_the_model_are_named():
    """A split that the model does not allow names the setting, its value and the allowed ones."""
    from spark_nemo.models.spec import ModelSpec

    shape = ModelSpec(
        num_layers=4,
        hidden_size=64,
        ffn_size=96,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=67,
        tied_embeddings=True,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_positions=64,
        init_std=0.02,
    )
    with pytest.raises(
        ConfigError,
        match=r"^megatron.tensor_parallel=3 does not divide .* choose one of 1, 2, 4, 8$",
    ):
        shape.check_layout(MegatronConfig(tensor_parallel=3))
    with pytest.raises(
        ConfigError, match=r"^megatron.pipeline_parallel=3 does not divide .* 1, 2, 4$"
    ):
        shape.check_layout(MegatronConfig(pipeline_parallel=3))


def test_batches_are_checked():
    """Rows of other lengths, and boundaries that do not rise to T, are errors with their name."""
    row = torch.zeros(4, dtype=torch.int64)
    good = {
        "tokens_T": row,
        "labels_T": row,
        "positions_T": row,
        "cu_seqlens_N": torch.tensor([0, 4]),
        "loss_mask_T": torch.ones(4),
    }
    PackedBatch(**good)
    with pytest.raises(ValueError, match=r"extras\['x'\] has shape \(3,\)"):
        PackedBatch(**good, extras={"x": torch.ones(3)})
    with pytest.raises(ValueError, match="cu_seqlens_N"):
        PackedBatch(**{**good, "cu_seqlens_N": torch.tensor([0, 2, 2, 4])})


def test_nothing_to_train_on_is_an_error(folders):
    """A step whose loss masks are all zero says so instead of dividing by zero."""
    worker = MegatronWorker.from_hf(folders[True], ONE, seed=0, optimizer=cases.ADAM)
    batch = cases.pack(
        [cases.Sequence(s.tokens, s.labels, s.mask * 0, s.weights) for s in cases.make_sequences()]
    )
    with pytest.raises(ValueError, match="loss_mask_T is zero everywhere"):
        worker.train_step([batch], cases.loss_fn)
