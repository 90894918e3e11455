"""How far a model's distributions are from a reference's, and how well it foretells the text."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Scores:
    """Sums over positions."""

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

    def add(self, other: "Scores") -> None:
        """Takes the sums of other positions."""
        self.count += other.count
        self.surprise += other.surprise
        self.agreed += other.agreed
        self.divergence += other.divergence
        self.divergence_squares += other.divergence_squares
        self.squares += other.squares
        self.largest = max(self.largest, other.largest)
        self.numbers += other.numbers

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

    def judge(self, logits: Tensor) -> Scores:
        """The scores of a model whose logits at these positions are given.

        With p the reference's likelihoods and e the logits' error, ē = Σ p·e, the divergence KL(reference ‖ model) is
        log Σ p·exp(e − ē), which loses little where e is small, and the model's own normaliser is the reference's
        + ē + the divergence.
        """
        error = logits - self.logits
        largest = max(map(abs, map(float, torch.aminmax(error))))
        squares = float(torch.linalg.vector_norm(error, dim=1).double().square().sum())
        mean = torch.linalg.vecdot(self.likelihoods, error)
        error.sub_(mean.unsqueeze(1)).expm1_()
        divergence = torch.linalg.vecdot(self.likelihoods, error).double().log1p()
        wanted = logits.gather(1, self.targets.unsqueeze(1)).squeeze(1).double()
        return Scores(
            count=len(wanted),
            surprise=float((self.normalisers + mean.double() + divergence - wanted).sum()),
            agreed=int((logits.argmax(1) == self.best).sum()),
            divergence=float(divergence.sum()),
            divergence_squares=float(divergence.square().sum()),
            squares=squares,
            largest=largest,
            numbers=error.numel(),
        )
