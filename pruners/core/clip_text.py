"""A CLIP model that compares patches of its own vision tower with text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from foveate.errors import MissingSignalError


@dataclass(frozen=True, eq=False)
class ClipText:
    """The CLIP model whose vision tower the VLM uses, to compare patches with the instruction.

    Attributes:
        model: a ``transformers`` ``CLIPModel``.
        tokenizer: its tokenizer.
        llm_tokenizer: the decoder's, to read the prompt.
    """

    model: Any
    tokenizer: Any
    llm_tokenizer: Any

    @torch.no_grad()
    def image_embeds(self, features: Tensor) -> Tensor:
        """Patches of the encoder ``(B, N, C)`` in the space shared with text: ``(B, N, E)``.

        Raises:
            MissingSignalError: the features are not those of this model's tower.
        """
        expected = self.model.visual_projection.in_features
        if features.shape[-1] != expected:
            raise MissingSignalError(
                f"the tower's features have {features.shape[-1]} channels, this CLIP model reads {expected}; pass the "
                "CLIP model of the VLM's own vision tower, or no clip (relevance='embeddings')"
            )
        weight = self.model.visual_projection.weight
        hidden = self.model.vision_model.post_layernorm(features.to(weight.device, weight.dtype))
        return self.model.visual_projection(hidden).to(features.device)

    @torch.no_grad()
    def text_embeds(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder tokens ``(B, T)``, -1 for none -> ``(B, M, E)`` one per segment, ``(B, M)`` which exist."""
        length, device = self.model.config.text_config.max_position_embeddings, self.model.device
        samples = []
        for row in ids.tolist():
            text = self.llm_tokenizer.decode([i for i in row if i >= 0], skip_special_tokens=True)
            whole = torch.tensor(self.tokenizer(text)["input_ids"], device=device)
            segments = pad(whole, (0, -len(whole) % length)).view(-1, length)
            samples.append(self.model.get_text_features(segments, return_dict=True).pooler_output)
        exists = pad_sequence([s.new_ones(len(s), dtype=torch.bool) for s in samples], batch_first=True)
        return pad_sequence(samples, batch_first=True).to(ids.device), exists.to(ids.device)
