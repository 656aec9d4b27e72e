"""The GPT-2 shapes that both sides train, and what training on a token costs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A GPT-2: `depth` layers of `width` channels; `rows` sequences of `length` tokens a step; products in `compute`."""

    depth: int
    width: int
    heads: int
    length: int
    rows: int
    vocabulary: int
    compute: str = "float32"

    @property
    def parameters(self) -> int:
        """Trainable scalars, with GPT-2's biases, learned positions and a tied output layer."""
        layer = 12 * self.width**2 + 13 * self.width
        return self.depth * layer + 2 * self.width + (self.vocabulary + self.length) * self.width

    @property
    def flops_per_token(self) -> float:
        """FLOPs of matrix products, forward and backward, attention over all keys."""
        return 6.0 * (self.depth * (12 * self.width**2 + 2 * self.width * self.length) + self.vocabulary * self.width)


SHAPES = {
    "XS": Shape(depth=2, width=64, heads=2, length=64, rows=16, vocabulary=65),
    "S": Shape(depth=4, width=128, heads=4, length=64, rows=12, vocabulary=65),
    "M": Shape(depth=6, width=384, heads=6, length=256, rows=8, vocabulary=65),
    "L": Shape(depth=12, width=768, heads=12, length=512, rows=2, vocabulary=50_304),
    # for a GPU: GPT-2 small and medium
    "124M": Shape(depth=12, width=768, heads=12, length=1024, rows=16, vocabulary=50_304, compute="bfloat16"),
    "350M": Shape(depth=24, width=1024, heads=16, length=1024, rows=8, vocabulary=50_304, compute="bfloat16"),
}
# steps between two looks at the loss, on both sides
LOG_EVERY = {"XS": 100, "S": 50, "M": 10, "L": 2, "124M": 10, "350M": 10}
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0
EVALUATED = 65_536  # tokens of the validation split that a trial is scored on


def rates_and_seeds(trials: str) -> tuple[list[float], list[int]]:
    """The trials "6x4": six learning rates from 3e-4 to 3e-3, four seeds each."""
    rates, seeds = map(int, trials.split("x"))
    return [3e-4 * 10 ** (i / max(rates - 1, 1)) for i in range(rates)], list(range(seeds))
