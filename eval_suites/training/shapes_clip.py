"""Train shapes-clip: a contrastive head on the vision tower of shapes-llava, and a small text encoder from nothing.

    python -m foveate.eval_suites.training.shapes_clip --out shapes-clip

The tower knows already what every patch shows; all of its blocks but the last stay as they are, so pictures are looked
at once, before training. The last block, both projections and the text encoder learn to bring a picture and its caption
together and everything else apart (InfoNCE over the batch). Captions name colour and shape of one to three objects,
half of them also the places.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from foveate.eval_suites.suites.shapes import MODEL_PATH as SHAPES_LLAVA
from foveate.eval_suites.suites.shapes import scenes
from foveate.eval_suites.training.base import Stage, TrainingRun, save_model
from foveate.eval_suites.training.shapes_model import MEAN, STD
from foveate.eval_suites.vision.scenes import caption, draw

STAGES = (Stage("clip", 2400, 96, 1.5e-3, warmup=100, decay=0.6),)
PICTURES, HELD_OUT = 12_000, 600
PLACED = 0.5  # share of batches whose captions say where things are
LENGTH = 24  # tokens of a caption, at most


def build_processor() -> CLIPProcessor:
    """Words as tokens, the end token last as OpenAI's has it; pictures as shapes-llava sees them."""
    words = ("<pad>", "<unk>", "<s>", *scenes.COLOURS, *scenes.SHAPES, *scenes.ROWS, *scenes.COLUMNS, "a", ",", "</s>")
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LENGTH,
    )
    side = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return CLIPProcessor(CLIPImageProcessorPil(size=side, crop_size=side, image_mean=MEAN, image_std=STD), fast)


def build(processor: CLIPProcessor) -> CLIPModel:
    """The tower of shapes-llava beside a new text encoder."""
    tower = LlavaForConditionalGeneration.from_pretrained(SHAPES_LLAVA, dtype=torch.float32).model.vision_tower
    tokenizer = processor.tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=tower.config.to_dict(), projection_dim=96)
    model = CLIPModel(config)
    model.vision_model.load_state_dict(tower.state_dict())
    return model


def normalised(pixels: np.ndarray) -> Tensor:
    """What the image processor makes of ``(B, 96, 96, 3)`` uint8."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def image_embeds(model: CLIPModel, rows: Tensor) -> Tensor:
    """The last block and the head on ``rows (B, N, D)``, for the class token alone: the rest is not read."""
    block = model.vision_model.encoder.layers[-1]
    attention, x = block.self_attn, block.layer_norm1(rows)
    heads = (len(x), -1, attention.num_heads, attention.head_dim)
    q = attention.q_proj(x[:, :1]).view(heads).transpose(1, 2)
    k, v = (project(x).view(heads).transpose(1, 2) for project in (attention.k_proj, attention.v_proj))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    token = rows[:, :1] + attention.out_proj(attended)
    token = token + block.mlp(block.layer_norm2(token))
    return model.visual_projection(model.vision_model.post_layernorm(token[:, 0]))


def recall(logits: Tensor, same: Tensor) -> Tensor:
    """Share of pictures whose best caption is right; ``same (B, B)`` says which captions are alike."""
    return same.gather(1, logits.argmax(dim=1, keepdim=True)).float().mean()


class Training(TrainingRun):
    """The one stage of shapes-clip."""

    stages = STAGES

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.processor = build_processor()
        self.model = build(self.processor)
        self.modules = {"model": self.model}
        self.seen: dict[bool, tuple[list[scenes.Scene], Tensor]] = {}

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        """The training batch of a step; a check's holds all held-out pictures."""
        held_out = step < 0
        drawn, rows = self.seen[held_out]
        rng = self.generator(held_out, 60, abs(step))
        chosen = np.arange(len(drawn)) if held_out else rng.integers(len(drawn), size=self.size(stage))
        placed = held_out or rng.random() < PLACED
        captions = [caption(drawn[i], placed) for i in chosen]
        tokens = self.processor.tokenizer(captions, padding=True, return_tensors="pt")
        same = torch.tensor([[a == b for b in captions] for a in captions])
        return {"rows": rows[chosen], "same": same, **tokens}

    def loss(self, stage: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = F.normalize(image_embeds(self.model, batch["rows"].float()), dim=-1)
        encoded = self.model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        text = F.normalize(self.model.text_projection(encoded.pooler_output), dim=-1)
        logits = self.model.logit_scale.clamp(max=4.6).exp() * (image @ text.T).float()
        same = batch["same"]
        target = same.float() / same.sum(dim=1, keepdim=True)  # equal captions are all right
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        found = {"image_to_text": recall(logits, same), "text_to_image": recall(logits.T, same)}
        return loss, found

    def check(self, stage: str, batches: int = 1) -> dict[str, float]:
        """Recall@1 among all held-out pictures."""
        return super().check(stage, batches)

    def trained(self, stage: str) -> list[tuple[nn.Module, float]]:
        model, scale = self.model, nn.Module()
        scale.logit = model.logit_scale
        tower = model.vision_model
        heads = (model.text_model, model.text_projection, model.visual_projection, tower.post_layernorm, scale)
        return [*((module, 1.0) for module in heads), (tower.encoder.layers[-1], 0.5)]  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def start_from(self, stage: str) -> None:
        """Draw the pictures and look at them: rows that enter the last block."""
        for held_out, count in ((False, PICTURES), (True, HELD_OUT)):
            rng = self.generator(held_out, 61)
            drawn, found = [], []
            for _ in range(0, count, 50):
                scenes_ = [draw(rng, held_out) for _ in range(50)]
                pixels = normalised(np.stack([scenes.render(scene, rng).pixels for scene in scenes_]))
                found.append(self.model.vision_model(pixels, output_hidden_states=True).hidden_states[-2].half())
                drawn += scenes_
            self.seen[held_out] = (drawn, torch.cat(found))

    def export(self) -> None:
        save_model(self.model, self.processor, self.out)


if __name__ == "__main__":
    Training.main(__doc__)
