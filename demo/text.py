"""The text encoder while it is trained, and the prompts' head start."""

import time

import torch
import torch.nn.functional as F

from . import loader, network, prompts

START, END = 49406, 49407  # CLIP's tokens around a prompt
UNKNOWN = 0.04  # share of words replaced by the row of words that were never seen
RATE, BATCH = 3e-3, 48


def initialise(module, closed=(), closing=0.05):
    """Initial weights; ComfyUI's layers leave them unset because it always loads a checkpoint.

    Args:
        module: of layers of ComfyUI's.
        closed: ends of the names of layers that end a residual branch, which start nearly closed.
        closing: their factor.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
            if name.endswith(tuple(closed)):
                layer.weight.data.mul_(closing)
        elif isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.02)


class TextEncoder(torch.nn.Module):
    """ComfyUI's text model with the few embedding rows that training needs.

    The last row stands for every word that is not in the vocabulary.
    """

    def __init__(self):
        super().__init__()
        self.tokenizer, self._known = loader.Tokenizer(), {}
        self.model = loader.TextModel(dtype=torch.float32).transformer.text_model
        self.model.requires_grad_(True)
        words = {t for p in prompts.all_prompts() for t in self.tokens(p)}
        self.ids = sorted(words | {START, END})
        self.index = {token: i for i, token in enumerate(self.ids)}
        initialise(self.model)
        del self.model.embeddings.token_embedding
        self.rows = torch.nn.Parameter(torch.randn(len(self.ids) + 1, network.CONTEXT) * 0.5)
        # most of a prompt is padding: let it say little at first
        self.rows.data[self.index[END]] *= 0.2

    def tokens(self, text):
        """77 token ids of a prompt; the word UNKNOWN of prompts.py is none that is known."""
        if text not in self._known:
            pairs = self.tokenizer.tokenize_with_weights(text)["l"][0]
            self._known[text] = [token for token, *_ in pairs]
        return self._known[text]

    def forward(self, texts):
        """Prompts (list of B strings) to context (B, 77, 64) and pooled (B, 64)."""
        unknown = len(self.ids)
        tokens = [self.tokens(p) for p in texts]
        where = torch.tensor([[self.index.get(t, unknown) for t in row] for row in tokens])
        ends = torch.tensor([row.index(END) for row in tokens])
        if self.training:
            fixed = (where == self.index[START]) | (where == self.index[END])
            where[(torch.rand(where.shape) < UNKNOWN) & ~fixed] = unknown
        x = self.rows[where.to(self.rows.device)]
        x = x + self.model.embeddings.position_embedding.weight
        length = x.shape[1]
        for layer in self.model.encoder.layers:
            # ComfyUI's own forward adds in place, which autograd refuses
            attention, h = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (
                p(h).view(len(x), length, attention.heads, -1).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attention.out_proj(h.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.layer_norm2(x))
        x = self.model.final_layer_norm(x)
        return x, x[torch.arange(len(x)), ends.to(x.device)]


def head_start(text, seconds, rng, report):
    """Teach the pooled prompt to name the look; else the UNet learns looks late.

    Args:
        text: TextEncoder. seconds: float. rng: numpy's. report: function of a line.
    """
    kinds = [*prompts.NAMES, None]
    head = torch.nn.Linear(network.CONTEXT, len(kinds)).to(text.rows.device)
    parameters = [p for p in [*text.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    start, right, share = time.monotonic(), 0.0, 0.0
    while share < 1:
        label = rng.integers(0, len(kinds), BATCH)
        guess = head(text([prompts.prompt(kinds[i], rng) for i in label])[1])
        label = torch.tensor(label, device=guess.device)
        optimizer.zero_grad()
        F.cross_entropy(guess, label).backward()
        share = min((time.monotonic() - start) / max(seconds, 1e-6), 1)
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.05, 1 - share)
        optimizer.step()
        right = 0.95 * right + 0.05 * float((guess.argmax(1) == label).float().mean())
    report(f"text: {right:.0%} of the prompts' looks named")
