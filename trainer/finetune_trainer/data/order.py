"""In which order samples are trained on: a pure function of seed, epoch and index, computed where it is needed.

The samples of a run are numbered from 0 on without end; number n is trained on in epoch ``n // samples`` and stands at place
``permute(n % samples)`` of the file. The permutation is a four-round Feistel network over the next power of four, walked until it falls
inside the range ("cycle walking"; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Unlike a shuffled list it needs
no memory and no start-up, so a job of any size resumes at any position, on any number of ranks, in constant time.
"""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 4


def sample_order(numbers: Indices, *, samples: int, seed: int) -> Indices:
    """Return, for each number of a run, which of ``samples`` samples it is."""
    epochs, places = np.divmod(numbers, samples)
    result = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = permute(places[chosen], size=samples, seed=seed, epoch=int(epoch))
    return result


def permute(places: Indices, *, size: int, seed: int, epoch: int) -> Indices:
    """Return the image of each of ``places`` under the permutation of ``range(size)`` that belongs to seed and epoch."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.asarray(np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64), dtype=np.uint64)
    words = places.astype(np.uint64)
    outside = np.ones(words.shape, dtype=bool)
    while outside.any():
        words[outside] = _encipher(words[outside], keys, half_bits)
        outside = words >= size
    return words.astype(np.int64)


def _encipher(words: Words, keys: Words, half_bits: int) -> Words:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = words >> np.uint64(half_bits), words & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    mixed: Words = (left << np.uint64(half_bits)) | right
    return mixed


def _mix(words: Words) -> Words:
    """Return a hash of each word: the finaliser of splitmix64, which passes BigCrush (Steele, Lea, Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed
