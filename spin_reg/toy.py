"""The embedded language: a small probabilistic grammar over the tokenizer's own tokens whose log p_data is exact.

A prompt is a topic and a mood. An answer is a walk over 16 letters: its first letter is drawn by (topic, mood), each
next one by (topic, last letter), and it ends with a probability that grows with its length. Every token of the
vocabulary keeps a share `smoothing / V` at every position, so the support is full and log p_data(y|x) is finite for
whatever a policy samples. Topics A-H are the game's; topics S-Z are the retained skill, which the base learns and
self-play never sees.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spin_reg.fingerprint import seed_of

GAME_TOPICS, RETAINED_TOPICS, MOODS = "ABCDEFGH", "STUVWXYZ", "1234"
LETTERS = "abcdefghijklmnop"
SHORTEST, LONGEST = 4, 12  # an answer may end after SHORTEST letters, and (smoothing aside) ends after LONGEST
SPREAD = 1.7  # standard deviation of the grammar's logits: how far from uniform a letter's successors are


class Language:
    """p_data over token ids.

    Args:
        seed: of the grammar's tables.
        letters: the token ids of the 16 letters.
        end: the token id that ends an answer.
        vocabulary: V, the number of token ids.
        smoothing: the probability spread evenly over all V tokens at every position.
    """

    def __init__(self, *, seed: int, letters: Sequence[int], end: int, vocabulary: int, smoothing: float) -> None:
        assert len(letters) == len(LETTERS)
        self.end, self.vocabulary, self.smoothing = end, vocabulary, smoothing
        self.letters = np.array(letters)
        self._state = {token: i for i, token in enumerate(letters)}
        rng = np.random.default_rng(seed_of("toy language", seed))
        topics = GAME_TOPICS + RETAINED_TOPICS
        shape = (len(LETTERS), len(LETTERS))
        self._next = {topic: _softmax(SPREAD * rng.standard_normal(shape)) for topic in topics}
        starts = [topic + mood for topic in topics for mood in MOODS]
        self._first = {start: _softmax(SPREAD * rng.standard_normal(len(LETTERS))) for start in starts}

    def next_probabilities(self, prompt: str, answer: Sequence[int]) -> NDArray[np.float64]:
        """p_data(. | prompt, answer so far): (V,), sums to 1."""
        last = self._state.get(answer[-1]) if answer else None
        letters = self._first[prompt] if last is None else self._next[prompt[0]][last]
        hazard = min(1.0, max(0.0, (len(answer) - SHORTEST + 1) / (LONGEST - SHORTEST + 1)))
        p = np.full(self.vocabulary, self.smoothing / self.vocabulary)
        p[self.letters] += (1 - self.smoothing) * (1 - hazard) * letters
        p[self.end] += (1 - self.smoothing) * hazard
        return p

    def draw(self, prompt: str, rng: np.random.Generator) -> list[int]:
        """One answer, its end token included."""
        answer: list[int] = []
        while not answer or answer[-1] != self.end:
            cumulative = self.next_probabilities(prompt, answer).cumsum()
            answer.append(int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")))
        return answer

    def logprob(self, prompt: str, answer: Sequence[int]) -> float:
        """log p_data(answer | prompt) in nats; of an answer without its end token, the log-prob of the prefix."""
        steps = [np.log(self.next_probabilities(prompt, answer[:j])[token]) for j, token in enumerate(answer)]
        return float(np.sum(steps))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def prompts(topics: str, count: int, rng: np.random.Generator) -> list[str]:
    """`count` prompts drawn evenly from the topics and moods."""
    return [topics[rng.integers(len(topics))] + MOODS[rng.integers(len(MOODS))] for _ in range(count)]
