"""Language models: their hidden MLP units, windows of text to read, how well they predict it, texts they write.

>>> layers = mlp_hidden(model)                                   # where the hidden units of every MLP can be read
>>> with hooks.edit(model, {layers[3]: hooks.zero([7], at="input")}):
...     nll(model, ids)
>>> ids, text = token_windows(tokenizer, texts, 64, seed=0)      # [N, 64] tokens, and of which text
>>> nll(model, ids, start=48)                                    # [N, 16] nats, of the last 16 tokens of each
>>> perplexity(model, ids, start=48)                             # one number
>>> sample(model, ids[:, :48], 10, new=16, temperature=1.0, seed=0)   # [N, 10, 16] ways to go on

Models are those of transformers, or any module that takes ``input_ids [N, T]`` and returns logits ``[N, T, V]``. All
windows of a batch have one length: nothing is padded, and no special token is added. Models run in evaluation mode and
come back as they were.
"""

from __future__ import annotations

from nbkit.language._likelihood import nll, perplexity
from nbkit.language._mlps import mlp_hidden
from nbkit.language._sample import sample
from nbkit.language._windows import token_windows

__all__ = ["mlp_hidden", "nll", "perplexity", "sample", "token_windows"]
