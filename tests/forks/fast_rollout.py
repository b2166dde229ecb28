"""A key-value cache whose buffers grow by 256 tokens, in the place of one copy of everything for each token.

    python tests/forks/fast_rollout.py [flags of save.py]

The same tokens, for up to 255 tokens more of memory; python tests/bench.py cache --policy DIR has the times. Layers
that keep something else (a sliding window, a state of linear attention) stay transformers' own.
"""
import sys
from pathlib import Path
from unittest import mock

from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import save  # noqa: E402

STEP = 256  # tokens

class GrowingLayer(DynamicLayer):
    """`keys` and `values` (rows, heads, tokens, size) are the filled part of `buffers`."""
    def fill(self, end):
        """The first `end` tokens of the buffers are what is cached."""
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def update(self, *states, **_):
        """Add the states of new tokens -> all keys, all values."""
        start, self.is_initialized = self.get_seq_length(), True
        end = start + states[0].shape[-2]
        if not start or end > self.buffers[0].shape[-2]:
            old, room = (self.keys, self.values), -(-end // STEP) * STEP
            self.buffers = [x.new_empty(*x.shape[:-2], room, x.shape[-1]) for x in states[:2]]
            for buffer, x in zip(self.buffers, old if start else ()):
                buffer[..., :start, :] = x
        for buffer, x in zip(self.buffers, states):
            buffer[..., start:end, :] = x
        return self.fill(end)

    def reorder_cache(self, rows):
        """Repeat or select rows, with the room behind them."""
        if self.get_seq_length():  # layers may share another's
            self.buffers = [buffer.index_select(0, rows) for buffer in self.buffers]
            self.fill(self.get_seq_length())

def growing_cache(config, plain=save.transformers.DynamicCache):
    """In the place of transformers.DynamicCache."""
    cache = plain(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache

def main(argv=None):
    """save.main with this cache until it returns."""
    with mock.patch.object(save.transformers, "DynamicCache", growing_cache):
        save.main(argv)

if __name__ == "__main__":
    main()
