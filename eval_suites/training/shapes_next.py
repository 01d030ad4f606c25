"""Turn shapes-llava into shapes-next, a LLaVA-NeXT (AnyRes) model for pictures of 192 x 96 pixels.

    python -m foveate.eval_suites.training.shapes_next --out shapes-next

The tower and the projector stay those of shapes-llava. The processor cuts a wide picture into two crops of 96 x 96, in
which objects have the size that the tower knows, and adds a thumbnail, in which they are squeezed. The decoder and the
embedding that ends the crops' rows learn to read 444 tokens instead of 144. Pictures are looked at once, before
training.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from foveate.eval_suites.suites.shapes import MODEL_PATH, WIDE, scenes
from foveate.eval_suites.training.base import Stage, TrainingRun, save_model, some_places
from foveate.eval_suites.training.shapes_lessons import question_blocks
from foveate.eval_suites.training.shapes_llava import answer_loss
from foveate.eval_suites.training.shapes_model import GRID, IMAGE_TOKENS, PATCH, TOKENS

STAGES = (Stage("next", 300, 16, 5e-4, warmup=20, decay=0.5),)
COLUMNS = WIDE // PATCH
LENGTH = IMAGE_TOKENS + GRID * (COLUMNS + 1)  # thumbnail, then rows of both crops, each with its end
PINPOINTS = [[scenes.IMAGE_SIZE, WIDE], [WIDE, scenes.IMAGE_SIZE], [WIDE, WIDE]]
KEEPS = (1.0, 0.5, 0.5, 0.25)  # shares of the visual tokens that stay, by step in turn
CACHED = 1024  # pictures


def build(source: LlavaForConditionalGeneration) -> LlavaNextForConditionalGeneration:
    """The AnyRes model with shapes-llava's weights; rows of crops end in the embedding of a full stop at first."""
    known = source.config
    config = LlavaNextConfig(
        vision_config=known.vision_config.to_dict(),
        text_config=known.text_config.to_dict(),
        image_token_id=known.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=known.vision_feature_layer,
        vision_feature_select_strategy=known.vision_feature_select_strategy,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlavaNextForConditionalGeneration(config)
    model.load_state_dict(source.state_dict(), strict=False)
    model.model.image_newline.data = source.get_input_embeddings().weight[TOKENS["."]].detach().clone()
    return model


def build_processor() -> LlavaNextProcessor:
    """That of shapes-llava with an AnyRes picture processor."""
    known = AutoProcessor.from_pretrained(MODEL_PATH)
    pictures = known.image_processor
    shared = {name: getattr(pictures, name) for name in ("size", "crop_size", "image_mean", "image_std")}
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(**shared, image_grid_pinpoints=PINPOINTS),
        known.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=known.chat_template,
    )


class Training(TrainingRun):
    """The one stage of shapes-next."""

    stages = STAGES

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.model = build(LlavaForConditionalGeneration.from_pretrained(MODEL_PATH, dtype=torch.float32))
        self.processor = build_processor()
        self.modules = {"model": self.model}
        self.caches: dict[bool, tuple[list[scenes.Scene], Tensor]] = {}

    def batch(self, stage: str, step: int) -> dict[str, Tensor]:
        held_out = step < 0
        rng = self.generator(held_out, 50, abs(step))
        drawn, tokens = self.caches[held_out]
        chosen = rng.integers(len(drawn), size=self.size(stage))
        rows = [question_blocks(scenes.ask_all(drawn[i], rng)) for i in chosen]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        return batch | {"patches": tokens[chosen]}

    def loss(self, stage: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        patches = batch["patches"].float()  # (B, 432, D), without the ends of rows
        size, width = len(patches), patches.shape[-1]
        rows = patches[:, IMAGE_TOKENS:].view(size, GRID, COLUMNS, width)
        ends = self.model.model.image_newline.expand(size, GRID, 1, width)
        tokens = torch.cat([patches[:, :IMAGE_TOKENS], torch.cat([rows, ends], dim=2).flatten(1, 2)], dim=1)
        keep = KEEPS[step % len(KEEPS)] if step >= 0 else 1.0
        where = some_places(size, LENGTH, keep, abs(step))
        tokens = tokens.gather(1, where[..., None].expand(-1, -1, width))
        return answer_loss(self.model.model.language_model, self.model, tokens, batch, where, LENGTH)

    def trained(self, stage: str) -> list[tuple[nn.Module, float]]:
        ends = nn.Module()
        ends.newline = self.model.model.image_newline
        return [(self.model.model.language_model, 1.0), (ends, 1.0)]  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def start_from(self, stage: str) -> None:
        """Draw the pictures and look at them."""
        for held_out in (False, True):
            rng = self.generator(held_out, 51)
            drawn = [scenes.draw_scene(rng, held_out) for _ in range(CACHED // 8 if held_out else CACHED)]
            found = []
            for scene in drawn:
                picture = scenes.render(scene, rng, WIDE).pixels
                inputs = self.processor.image_processor(picture, return_tensors="pt", input_data_format="channels_last")
                seen = self.model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True)
                views = self.model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])  # (3, 144, D)
                rows = views[1:].view(2, GRID, GRID, -1).transpose(0, 1).reshape(-1, views.shape[-1])
                found.append(torch.cat([views[0], rows]).half())
            self.caches[held_out] = (drawn, torch.stack(found))

    def export(self) -> None:
        self.model.generation_config.pad_token_id = TOKENS["<pad>"]
        self.model.generation_config.max_new_tokens = 40
        save_model(self.model, self.processor, self.out)


if __name__ == "__main__":
    Training.main(__doc__)
