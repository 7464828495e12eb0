"""A bigram model with MegatronWorker's methods, to test the training loops without Megatron.

Its log-probabilities come from a learnt table: row = input token. It does not cover attention,
parallel layouts and the learning-rate schedule.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

from spark_nemo.megatron.worker import StepResult


class BigramWorker:
    """One process that plays all data-parallel ranks when ``train_step`` is given every rank's
    micro-batches.
    """

    def __init__(self, vocab_size: int = 8, lr: float = 0.1, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table_VV = torch.randn(vocab_size, vocab_size, generator=generator).requires_grad_()
        self.optimizer = torch.optim.AdamW([self.table_VV], lr=lr)
        self.dp_rank = 0
        self.dp_size = 1
        self.is_main = True
        self.quadratic_cost = 0.0
        self.grads: list[torch.Tensor] = []
        self.logprob_passes = 0

    def _forward(self, batch, temperature):
        logprobs_TV = (self.table_VV[batch.tokens_T] / temperature).log_softmax(-1)
        logprobs_T = logprobs_TV.gather(1, batch.labels_T[:, None])[:, 0]
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1).detach()
        return logprobs_T, entropy_T

    @torch.no_grad()
    def logprobs(self, micro_batches, temperature=1.0):
        self.logprob_passes += 1
        return [self._forward(batch, temperature)[0] for batch in micro_batches]

    def train_step(self, micro_batches, loss_fn, temperature=1.0, with_entropy=False):
        self.optimizer.zero_grad()
        num_tokens = sum(float(batch.loss_mask_T.sum()) for batch in micro_batches)
        total, metrics = 0.0, {}
        for batch in micro_batches:
            logprobs_T, entropy_T = self._forward(batch, temperature)
            loss_sum, sums = loss_fn(logprobs_T, entropy_T if with_entropy else None, batch)
            (loss_sum / num_tokens).backward()
            total += float(loss_sum)
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in sums.items()}
        self.grads.append(self.table_VV.grad.clone())
        self.optimizer.step()
        norm = float(self.grads[-1].norm())
        return StepResult(
            total / num_tokens, norm, self.optimizer.param_groups[0]["lr"], num_tokens, metrics
        )

    def snapshot(self):
        return {"table": self.table_VV.detach().clone()}

    @contextmanager
    def use_weights(self, snapshot):
        kept = self.snapshot()
        with torch.no_grad():
            self.table_VV.copy_(snapshot["table"])
        yield
        with torch.no_grad():
            self.table_VV.copy_(kept["table"])

    def save_checkpoint(self, folder, state):
        folder.mkdir(parents=True, exist_ok=True)
        saved = {"table": self.table_VV, "optimizer": self.optimizer.state_dict(), "state": state}
        torch.save(saved, folder / "new.pt")
        # A file of this name, where the worker has a pointer to a folder.
        (folder / "new.pt").replace(folder / "latest")

    def load_checkpoint(self, folder):
        saved = torch.load(folder / "latest", weights_only=False)
        with torch.no_grad():
            self.table_VV.copy_(saved["table"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return saved["state"]
