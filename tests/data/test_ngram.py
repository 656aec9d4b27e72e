"""The n-gram model against its recursion, plainly written, and against what every model must do: sum to one."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from llm_jax.data import ngram


def plain(train, symbols, order):
    """The formula of the module over dictionaries of tuples."""
    text = (symbols,) * (order - 1) + tuple(train)
    places = range(order - 1, len(text))
    seen = [{text[i - n + 1 : i + 1] for i in places} for n in range(1, order + 1)]
    counts = [Counter(gram[1:] for gram in seen[n]) for n in range(1, order)]
    counts.append(Counter(text[i - order + 1 : i + 1] for i in places))
    after = []
    for found in counts:
        by_history = defaultdict(dict)
        for gram, count in found.items():
            by_history[gram[:-1]][gram[-1]] = count
        after.append(by_history)

    def probability(history, word):
        if history is None:
            return 1 / symbols
        n = len(history)
        lower = probability(history[1:] if n else None, word)
        found = after[n].get(history)
        if found is None:
            return lower
        once, twice = (max(sum(c == times for c in counts[n].values()), 1) for times in (1, 2))
        discount = once / (once + 2 * twice)
        total = sum(found.values())
        return max(found.get(word, 0) - discount, 0) / total + discount * len(found) / total * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_the_formula(order):
    rng = np.random.default_rng(order)
    train, valid = rng.geometric(0.3, 200) % 7, rng.geometric(0.25, 60) % 8
    model, expected = ngram.fit(train, 9, order=order), plain(train.tolist(), 9, order)
    text = (9,) * (order - 1) + tuple(valid.tolist())
    wanted = [np.log2(expected(text[i : i + order - 1], text[i + order - 1])) for i in range(len(valid))]
    np.testing.assert_allclose(model.log2(valid), wanted, rtol=1e-12)


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    model = ngram.fit(rng.geometric(0.3, 300) % 6, 8, order=3)
    for history in ([], [1], [1, 2], [7, 7, 1], [0, 1, 0, 2]):
        assert sum(2 ** model.log2(np.array([*history, word]))[-1] for word in range(8)) == pytest.approx(1)


def test_a_repetition_costs_next_to_nothing_and_noise_its_entropy():
    again = np.tile(np.arange(50), 40)
    assert -ngram.fit(again, 50).log2(again).mean() < 0.05
    noise = np.random.default_rng(0).integers(0, 16, 40_000)
    assert -ngram.fit(noise[:30_000], 16, order=2).log2(noise[30_000:]).mean() == pytest.approx(4, abs=0.05)
