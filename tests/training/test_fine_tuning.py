"""The fine-tuning loop on a bigram model: its order, its resume, its stop. Megatron:
test_megatron_loops.
"""

from dataclasses import replace

import pytest
import torch
from bigram import BigramWorker

from spark_nemo.config import ConfigError, FineTuningConfig, OptimizerConfig
from spark_nemo.training.fine_tuning import (
    batch_indices,
    held_out_loss,
    num_sft_steps,
    sft_loss,
    train_sft,
)
from spark_nemo.training.metrics_writer import METRICS_FILE, read_metrics
from spark_nemo.training.packing import TrainSequence, pack
from spark_nemo.training.stop import StopFlag

SEQUENCES = [
    TrainSequence((n % 3,), tuple((n + k) % 8 for k in range(1 + n % 4))) for n in range(10)
]
SETTINGS = FineTuningConfig(epochs=3, batch_size=4, save_every=2)


class StopAfter(StopFlag):
    """Asks for a stop once it was looked at ``looks`` times."""

    def __init__(self, folder, looks):
        super().__init__(folder)
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


def run(worker, folder, stop=None, sequences=SEQUENCES, settings=SETTINGS, **changes):
    return train_sft(
        worker,
        sequences,
        settings,
        run_folder=folder,
        stop=stop or StopFlag(folder),
        **{"tokens_per_micro_batch": 5, "seed": 1, **changes},
    )


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder / METRICS_FILE)]


def test_every_epoch_visits_every_sequence_once_in_its_own_order():
    """Epochs are permutations that differ from each other and with the seed, without state."""
    steps = num_sft_steps(10, 2, 4)
    visited = [batch_indices(step, 10, 4, seed=1) for step in range(steps)]
    assert [len(batch) for batch in visited] == [4, 4, 2, 4, 4, 2]
    first, second = (
        [index for batch in epoch for index in batch] for epoch in (visited[:3], visited[3:])
    )
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert visited[0] != batch_indices(0, 10, 4, seed=2)
    assert visited[4] == batch_indices(4, 10, 4, seed=1)


def test_it_learns(tmp_path):
    """The loss falls, and there is one row per step."""
    result = run(BigramWorker(lr=0.5), tmp_path, settings=replace(SETTINGS, epochs=10))
    assert result.finished
    history = losses(tmp_path)
    assert [step for step, _ in history] == list(range(30))
    assert sum(loss for _, loss in history[-3:]) < sum(loss for _, loss in history[:3]) / 2


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_stopped_run_resumes_exactly(tmp_path, stop_after):
    """Stop at a step that is (or is not) a save step, resume in a new worker: losses and weights
    equal bit for bit.
    """
    whole, parts = BigramWorker(), BigramWorker(seed=7)
    run(whole, tmp_path / "whole")
    stopped = run(BigramWorker(), tmp_path / "parts", stop=StopAfter(tmp_path, stop_after))
    assert (stopped.step, stopped.finished) == (stop_after, False)
    assert run(parts, tmp_path / "parts").finished
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(whole.table_VV, parts.table_VV)


def test_a_killed_run_loses_only_the_steps_since_its_checkpoint(tmp_path):
    """A crash in step 5 (as kill -9 would): rows 4.. are dropped and written again, none twice."""

    class Dies(BigramWorker):
        def train_step(self, *args, **kwargs):
            if len(self.grads) == 5:
                raise KeyboardInterrupt
            return super().train_step(*args, **kwargs)

    run(BigramWorker(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Dies(), tmp_path / "parts")
    assert len(losses(tmp_path / "parts")) == 5
    resumed = BigramWorker(seed=7)
    run(resumed, tmp_path / "parts")
    assert len(resumed.grads) == 9 - 4
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_finished_run_is_left_alone(tmp_path):
    """Calling again makes no step and keeps the metrics."""
    run(BigramWorker(), tmp_path)
    before = (tmp_path / METRICS_FILE).read_bytes()
    again = BigramWorker(seed=7)
    assert run(again, tmp_path).finished
    assert again.grads == []
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_checkpoint_of_other_data_or_order_is_rejected(tmp_path):
    """Resuming under another seed would silently train on some sequences twice."""
    run(BigramWorker(), tmp_path, stop=StopAfter(tmp_path, 2))
    with pytest.raises(ValueError, match=r"^seed=2: .*seed=1"):
        run(BigramWorker(), tmp_path, seed=2)
    with pytest.raises(ValueError, match="data="):
        run(BigramWorker(), tmp_path, sequences=[*SEQUENCES[:-1], TrainSequence((1,), (2,))])


def test_a_checkpoint_of_another_optimizer_or_base_is_rejected(tmp_path):
    """Another learning rate half-way would be neither run."""
    settings = replace(SETTINGS, optimizer=OptimizerConfig(lr=0.1))
    other = replace(SETTINGS, optimizer=OptimizerConfig(lr=0.2))
    made = {"settings": settings, "base_fingerprint": "a"}
    run(BigramWorker(), tmp_path, stop=StopAfter(tmp_path, 2), **made)
    with pytest.raises(ConfigError, match=r"^optimizer\.lr="):
        run(BigramWorker(), tmp_path, **{**made, "settings": other})
    with pytest.raises(ConfigError, match=r"^base_model="):
        run(BigramWorker(), tmp_path, **{**made, "base_fingerprint": "b"})
    assert run(BigramWorker(), tmp_path, **made).finished


def test_held_out_loss_is_the_loss_of_a_step_that_did_not_train(tmp_path):
    """The same mean over response tokens as the training loss, whatever the packing; measured
    before its step, and it changes no training number.
    """
    worker = BigramWorker()
    expected = BigramWorker().train_step(pack(SEQUENCES, 5).micro_batches, sft_loss).loss
    assert held_out_loss(worker, SEQUENCES, 5) == pytest.approx(expected, abs=1e-6)
    assert held_out_loss(worker, SEQUENCES, 1000) == pytest.approx(expected, abs=1e-6)
    run(worker, tmp_path / "with", held_out=SEQUENCES[:4], eval_every=4)
    run(BigramWorker(), tmp_path / "without")
    rows = read_metrics(tmp_path / "with" / METRICS_FILE)
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 4, 8]
    assert rows[0]["held_out_loss"] == pytest.approx(
        held_out_loss(BigramWorker(), SEQUENCES[:4], 5)
    )
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
