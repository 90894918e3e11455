"""How far a model's distributions are from a reference's, and how well it foretells the text."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """What the reference model makes of consecutive positions, and the tokens that follow each of them in the text."""

    logits: Tensor
    """float32 [rows, vocabulary], as the likelihoods are."""
    likelihoods: Tensor
    normalisers: Tensor
    """float64 [rows]: log Σ exp(logits)."""
    best: Tensor
    targets: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> "Reference":
        return cls(logits, logits.softmax(1), logits.logsumexp(1).double(), logits.argmax(1), targets)

    def rows(self, begin: int, end: int) -> "Reference":
        part = slice(begin, end)
        return Reference(
            self.logits[part],
            self.likelihoods[part],
            self.normalisers[part],
            self.best[part],
            self.targets[part],
        )


@dataclass(slots=True)
class Scores:
    """Sums over the positions given to ``add``."""

    count: int = 0
    surprise: float = 0.0
    """Sum of −log p of the text's next token."""
    agreed: int = 0
    divergence: float = 0.0
    """Sum of KL(reference ‖ model), in nats."""
    divergence_squares: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    numbers: int = 0

    def add(self, logits: Tensor, reference: Reference) -> None:
        """logits: float32, those of the reference's positions.

        With p the reference's likelihoods and e the logits' error, ē = Σ p·e, the divergence KL(reference ‖ model) is
        log Σ p·exp(e − ē), which loses little where e is small, and the model's own normaliser is the reference's
        + ē + the divergence.
        """
        error = logits - reference.logits
        self.numbers += error.numel()
        self.largest = max(self.largest, *map(abs, map(float, torch.aminmax(error))))
        self.squares += float(torch.linalg.vector_norm(error, dim=1).double().square().sum())
        mean = torch.linalg.vecdot(reference.likelihoods, error)
        error.sub_(mean.unsqueeze(1)).expm1_()
        divergence = torch.linalg.vecdot(reference.likelihoods, error).double().log1p()
        wanted = logits.gather(1, reference.targets.unsqueeze(1)).squeeze(1)
        self.surprise += float((reference.normalisers + mean.double() + divergence - wanted.double()).sum())
        self.count += len(wanted)
        self.agreed += int((logits.argmax(1) == reference.best).sum())
        self.divergence += float(divergence.sum())
        self.divergence_squares += float(divergence.square().sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.surprise / self.count)

    @property
    def agreement(self) -> float:
        """The share of positions where both think the same token the likeliest."""
        return self.agreed / self.count

    @property
    def mean_divergence(self) -> float:
        return self.divergence / self.count

    @property
    def divergence_error(self) -> float:
        """Standard error of the mean."""
        variance = self.divergence_squares / self.count - self.mean_divergence**2
        return math.sqrt(max(0.0, variance) / self.count)

    @property
    def rms_error(self) -> float:
        """Of the logits themselves."""
        return math.sqrt(self.squares / self.numbers)
